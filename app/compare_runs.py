"""The runs that a person picked for comparison: their names, marks, colours, and which of them may be compared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from app.components.lanes import LANE_COLOURS, LANE_MARKS, lane_name
from studio_state.history import History
from studio_state.history_page import Run, RunKey, read_runs
from studio_state.metrics import METRICS
from studio_state.store_rows import ExperimentRow

MAX_PICKED = 64
SPEED_FIRST = (
    "decode_tokens_per_s",
    "images_per_s",
    "denoising_steps_per_s",
    "seconds_per_image",
    "score_tokens_per_s",
    "prefill_tokens_per_s",
    "ttft_s",
    "end_to_end_s",
)
MEMORY_FIRST = ("peak_memory_bytes", "kv_bytes", "weight_bytes")
QUALITY_FIRST = (
    "accuracy",
    "perplexity",
    "class_agreement",
    "top1_agreement",
    "kl_to_baseline",
    "ssim",
    "psnr",
    "feature_similarity",
    "frechet_distance",
    "same_output",
    "first_divergence",
    "nll",
)


@dataclass(frozen=True, eq=False)
class Picked:
    """A picked run as it appears in every chart, table and text of the page.

    Attributes:
        id: ``experiment/lane``.
        name: own name or pipeline; with the model or the time added where two would be called the same.
        group: runs of one group did the same work on the same device, so their numbers may be compared.
    """

    id: str
    run: Run
    name: str
    mark: str
    colour: str
    group: str

    @property
    def is_baseline(self) -> bool:
        """True for the empty pipeline."""
        return not self.run.row.steps.get("steps")


def key_of(text: str) -> RunKey | None:
    """``experiment/lane`` as a key; None if it is not one."""
    experiment, _, lane = text.rpartition("/")
    return (experiment, int(lane)) if experiment and lane.isdigit() and len(lane) < 6 else None


def id_of(key: RunKey) -> str:
    """A key as ``experiment/lane``."""
    return f"{key[0]}/{key[1]}"


def load_picked(history: History, ids: Iterable[str]) -> list[Picked]:
    """The picked runs in the order in which they were picked, at most ``MAX_PICKED``."""
    keys = [k for k in (key_of(str(x)) for x in ids) if k is not None][:MAX_PICKED]
    return as_picked(read_runs(history, keys))


def as_picked(runs: Sequence[Run]) -> list[Picked]:
    """Runs with names, marks and colours. Baselines take the ink of the page, the others the palette in turn."""
    names, found, own = _names(runs), [], 0
    for run, name in zip(runs, names, strict=True):
        baseline = not run.row.steps.get("steps")
        style = 0 if baseline else 1 + own % (len(LANE_COLOURS) - 1)
        own += not baseline
        found.append(Picked(id_of(run.key), run, name, LANE_MARKS[style], LANE_COLOURS[style], group_of(run.experiment)))
    return found


def short_name(run: Run) -> str:
    """What a lane is called on the page."""
    return lane_name(run.row.lane, str(run.row.steps.get("name") or ""), run.row.pipeline)


def model_title(model: str | None) -> str:
    """A model in few words: the last part of a path or of a Hub id."""
    return (model or "unknown model").rstrip("/").rsplit("/", 1)[-1]


def clock_time(t: float | None) -> str:
    """A moment for people, in the server's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(t)) if t else ""


def _names(runs: Sequence[Run]) -> list[str]:
    """Short names; where several are equal, what tells them apart is added: model, workload, time, and at last a number."""
    names = [short_name(r) for r in runs]
    extras: tuple[Callable[[Run], str], ...] = (
        lambda r: model_title(r.experiment.model), lambda r: r.experiment.workload or "",
        lambda r: clock_time(r.experiment.submitted), lambda r: r.experiment.id[-6:],
    )  # fmt: skip
    for extra in extras:
        for name in {n for n in names if names.count(n) > 1}:
            at = [i for i, n in enumerate(names) if n == name]
            words = [extra(runs[i]) for i in at]
            if len(set(words)) > 1:
                for i, word in zip(at, words, strict=True):
                    names[i] = f"{name} · {word}"
    return names


def group_of(row: ExperimentRow) -> str:
    """Identity of the work and the place: workload with its options, device, batch, length and seed."""
    spec = row.spec or {}
    same = {k: spec.get(k) for k in ("batch", "seed", "max_new_tokens", "eos", "chat_template", "system_prompt", "sampling")}
    return json.dumps([row.workload, (spec.get("workload") or {}).get("options"), row.device, same], sort_keys=True)


def metric_choices(picked: Sequence[Picked], groups: tuple[str, ...], first: Sequence[str]) -> list[str]:
    """Names of metrics that at least one run has, the usual ones first."""
    here = {n for p in picked for n, m in p.run.metrics.items() if m.value is not None}
    names = [
        n
        for n in METRICS
        if n in here and METRICS[n].group in groups and METRICS[n].better != "neither" and n not in _NOT_OF_A_LANE
    ]
    return sorted(names, key=lambda n: first.index(n) if n in first else len(first))


_NOT_OF_A_LANE = ("load_s", "build_s", "warmup_s")


def speed_and_memory(picked: Sequence[Picked]) -> list[str]:
    """Metrics for the x axis."""
    return metric_choices(picked, ("speed", "memory"), (*SPEED_FIRST, *MEMORY_FIRST))


def quality(picked: Sequence[Picked]) -> list[str]:
    """Metrics for the y axis: a task's own truth comes before closeness to the baseline."""
    return metric_choices(picked, ("quality",), QUALITY_FIRST)


def default_quality(picked: Sequence[Picked]) -> str | None:
    """The first quality metric that tells runs apart; the first at all where none does.

    A task on which every run scores the same (all right, or all wrong) shows nothing; closeness to the baseline may.
    """
    names = quality(picked)
    telling = [n for n in names if len({p.run.value(n) for p in picked} - {None}) > 1]
    return next(iter(telling or names), None)


def table_style(picked: Sequence[Picked]) -> list[dict[str, Any]]:
    """Name, mark and colour of every run, for the browser."""
    return [{"id": p.id, "name": p.name, "mark": p.mark, "colour": p.colour} for p in picked]
