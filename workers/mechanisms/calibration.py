"""What goes into the linear maps of a model: gathered on a few inputs, group by group, and kept on disk by content.

Methods that round or prune weights by what the model computes with them need statistics of each map's input. They are
gathered by looking on while the attached model runs calibration inputs: language models read the end of *Persuasion*, which no
workload measures on (models that see do so too where the workload shows them nothing); the other families get items of the
experiment's own workload that the experiment does not run. Maps are taken in groups whose statistics fit a budget of memory,
and each map is finished with before the next group is gathered.
All groups see the model as the policies before this one left it, not what this one has replaced already.

Shapes: R input rows, K inputs of a map.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from studio_state.errors import SpecError
from studio_state.paths import default_cache_root
from workers.data.novels import held_out
from workers.mechanisms.linear import matrix_of
from workers.session import Session
from workers.workloads.base import Item

Want = Literal["moment", "sample"]
GROUP_BYTES = 1 << 30  # statistics gathered in one pass
CACHE_BYTES = 4 << 30  # of all files that are kept; the longest unused go first
SAMPLE_ROWS = 256
TEXT_TOKENS = 512  # of one calibration text, where the model's context allows
PROBES = 64  # values of each tensor that stand for it in the key of a file
FORMAT = 2  # of the files; another number makes old ones unused


@dataclass(frozen=True)
class Seen:
    """Statistics of the inputs of one linear map, float32.

    Attributes:
        rows: R, how many rows went in.
        mean_abs, max_abs: [K] of the absolute value.
        moment: [K, K] mean of x x^T, if wanted.
        sample: [r, K] rows, r at most :data:`SAMPLE_ROWS`, if wanted.
        beside: first of the maps (in the model's order) that were given the very same tensor; itself if none came before.
    """

    rows: int
    mean_abs: Tensor
    max_abs: Tensor
    moment: Tensor | None
    sample: Tensor | None
    beside: str


@dataclass
class _Gathering:
    """Running sums of one map."""

    wants: frozenset[Want]
    rows: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: list[Tensor] = field(default_factory=list)
    beside: str = ""


def gathered(
    session: Session, names: Sequence[str], wants: frozenset[Want], samples: int
) -> Iterator[tuple[Sequence[str], Mapping[str, Seen]]]:
    """Statistics of some linear maps, in groups; let go of one group before asking for the next.

    A map that no calibration input reaches (an expert that nobody visits) is missing from its group's statistics.

    Args:
        names: linear maps that stand in the model now.
        samples: how many texts, images or drawings are run.

    Raises:
        SpecError: the workload has no items besides those that the experiment runs.
    """
    for group in _groups(session, names, wants):
        session.check_cancelled()
        file = _file(session, group, wants, samples)
        seen = _read(file, group)
        if seen is None:
            seen = _run(session, group, wants, samples)
            _write(file, seen)
        yield group, seen


def sharing_inputs(seen: Mapping[str, Seen]) -> dict[str, list[str]]:
    """Maps that are given the very same tensor, under the first of them."""
    found: dict[str, list[str]] = {}
    for name, one in seen.items():
        found.setdefault(one.beside, []).append(name)
    return found


def _groups(session: Session, names: Sequence[str], wants: frozenset[Want]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name in names:
        width = matrix_of(session.model.get_submodule(name)).shape[1]
        mine = 4 * width * (2 + ("moment" in wants) * width + ("sample" in wants) * SAMPLE_ROWS)
        if group and size + mine > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += mine
    if group:
        yield group


def calibration_items(session: Session, samples: int) -> list[Item]:
    """Inputs that the experiment does not measure on; of a model that sees, none about a picture that it does.

    Raises:
        SpecError: the workload has too few.
    """
    spec = session.spec
    if session.family.id == "llm":
        return _texts(session, samples)

    def items(turn: int) -> list[Item]:
        return session.items_of(spec.seed + 7919 * turn, turn * samples)

    own = items(0)
    if session.family.id == "vlm" and all(i.image is None for i in own):
        return _texts(session, samples)
    measured = {_subject(i) for i in own}
    found: dict[str, Item] = {}
    for turn in range(1, 9):
        found.update({f"{i.prompt}\0{s}": i for i in items(turn) if (s := _subject(i)) not in measured})
        if len(found) >= samples:
            break
    if not found:
        raise SpecError(
            f"{spec.workload.id}: with these options it has no items besides those that are measured, and this policy needs "
            "some to calibrate on; give it fewer items, or remove the policy"
        )
    return list(found.values())[:samples]


def _texts(session: Session, samples: int) -> list[Item]:
    """Pieces of the text that no workload measures on, one after the other."""
    ids = session.tokens_of(held_out())
    length = min(TEXT_TOKENS, session.info.context or TEXT_TOKENS, len(ids) // samples)
    cuts = [tuple(ids[i * length : (i + 1) * length]) for i in range(samples)]
    return [Item(id=f"calibration-{i}", prompt_ids=c, max_new_tokens=1, ignore_eos=True) for i, c in enumerate(cuts)]


def _subject(item: Item) -> str:
    """What is new in it: its picture, or else its words and the seed of what is drawn."""
    if item.image is not None:
        return hashlib.sha256(item.image.open().tobytes()).hexdigest()
    return f"{item.prompt}\0{item.prompt_ids}\0{item.data.get('seed', '')}"


def _run(session: Session, names: Sequence[str], wants: frozenset[Want], samples: int) -> dict[str, Seen]:
    """Run the calibration inputs once, looking at these maps."""
    items = calibration_items(session, samples)
    each = -(-SAMPLE_ROWS // len(items))
    found = {name: _Gathering(wants) for name in names}
    last: list[tuple[Tensor, str, dict[str, Tensor]]] = []  # the newest tensor that went in, where first, and what was found

    def looking(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            mine, x = found[name], args[0]
            if not last or last[0][0] is not x:
                last[:] = [(x, name, _statistics(x, wants))]
            _, mine.beside, new = last[0]
            mine.rows += new["rows"].shape[0]
            for key in ("sum", "moment"):
                if key in new:
                    mine.sums[key] = mine.sums[key] + new[key] if key in mine.sums else new[key]
            mine.sums["max"] = torch.maximum(mine.sums["max"], new["max"]) if "max" in mine.sums else new["max"]
            room = min(each, SAMPLE_ROWS - sum(map(len, mine.samples)))
            if "sample" in wants and room > 0:
                mine.samples.append(_spread(new["rows"], room))

        return look

    spec = session.spec.model_copy(update={"max_new_tokens": 1, "chunk_size": None})
    with ExitStack() as stack:
        stack.enter_context(session.having(spec=spec, counts={}, acted={}))
        for name in names:
            handle = session.model.get_submodule(name).register_forward_pre_hook(looking(name))
            stack.callback(handle.remove)
        for i, item in enumerate(items):
            session.check_cancelled()
            session.say(f"calibrating: input {i + 1} of {len(items)}", i / len(items))
            trace = session.family.begin(session, [item])
            for _ in session.family.run(session, trace):
                pass
            last.clear()
    return {name: _seen(name, g) for name, g in found.items() if g.rows}


def _statistics(x: Tensor, wants: frozenset[Want]) -> dict[str, Tensor]:
    """Of one tensor [..., K] that goes in."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    new = {"rows": rows, "sum": rows.abs().sum(0), "max": rows.abs().amax(0)}
    return {**new, "moment": rows.T @ rows} if "moment" in wants else new


def _spread(rows: Tensor, count: int) -> Tensor:
    """Some rows, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device).round().long()].clone()


def _seen(name: str, g: _Gathering) -> Seen:
    moment = g.sums["moment"] / g.rows if "moment" in g.sums else None
    sample = torch.cat(g.samples) if g.samples else None
    return Seen(g.rows, g.sums["sum"] / g.rows, g.sums["max"], moment, sample, g.beside or name)


# -- the files -----------------------------------------------------------------------------
def _file(session: Session, names: Sequence[str], wants: frozenset[Want], samples: int) -> Path:
    """Where these statistics are kept: named after the weights as they stand and after what is run."""
    digest = hashlib.sha256()
    run = {"format": FORMAT, "names": list(names), "wants": sorted(wants), "samples": samples, "dtype": str(session.dtype)}
    spec = session.spec
    if session.family.id != "llm":
        run |= {"workload": spec.workload.model_dump(mode="json"), "seed": spec.seed}
    digest.update(json.dumps(run, sort_keys=True, default=str).encode())
    for name, tensor in sorted({**dict(session.model.named_parameters()), **dict(session.model.named_buffers())}.items()):
        flat = tensor.detach().flatten()
        at = torch.linspace(0, max(0, flat.numel() - 1), min(PROBES, flat.numel()), dtype=torch.float64).round().long()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(flat[at.to(flat.device)].double().cpu().numpy().tobytes())
    return default_cache_root() / "calibration" / f"{digest.hexdigest()[:40]}.safetensors"


def _read(file: Path, names: Sequence[str]) -> dict[str, Seen] | None:
    """What an earlier run left, or None; a damaged file is made again."""
    try:
        with safe_open(file, framework="pt") as f:
            facts = json.loads(f.metadata()["seen"])
            seen = {}
            for name in names:
                if name not in facts:
                    continue
                parts = {key: f.get_tensor(f"{name}:{key}") for key in facts[name]["parts"]}
                seen[name] = Seen(
                    facts[name]["rows"],
                    parts["mean_abs"],
                    parts["max_abs"],
                    parts.get("moment"),
                    parts.get("sample"),
                    facts[name]["beside"],
                )
        file.touch()
        return seen
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError, TypeError):
        return None


def _write(file: Path, seen: Mapping[str, Seen]) -> None:
    """Keep them, if there is room; the longest unused files give way."""
    tensors, facts = {}, {}
    for name, one in seen.items():
        parts = {"mean_abs": one.mean_abs, "max_abs": one.max_abs, "moment": one.moment, "sample": one.sample}
        given = {key: t.cpu().contiguous() for key, t in parts.items() if t is not None}
        tensors.update({f"{name}:{key}": t.clone() for key, t in given.items()})
        facts[name] = {"rows": one.rows, "beside": one.beside, "parts": list(given)}
    with _writable(file) as draft:
        if draft is not None and tensors:
            save_file(tensors, draft, {"seen": json.dumps(facts)})


@contextmanager
def _writable(file: Path) -> Iterator[Path | None]:
    """A draft that becomes the file; None where nothing can be written. Calibration goes on without a cache then."""
    draft = file.with_suffix(".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if draft.exists():
            draft.replace(file)
        kept = sorted(file.parent.glob("*.safetensors"), key=lambda f: f.stat().st_mtime, reverse=True)
        total = 0
        for one in kept:
            total += one.stat().st_size
            if total > CACHE_BYTES and one != file:
                one.unlink(missing_ok=True)
    except OSError:
        draft.unlink(missing_ok=True)
