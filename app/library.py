"""One method as the library shows it: its card in words, what it cannot stand with, and the runs that used it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from app.compare_runs import clock_time, id_of, model_title, short_name
from app.components.numbers import interval_text, metric_title, ratio_text
from app.race_view import verdict
from studio_state.catalog import STAGES, Card, Catalog
from studio_state.events import Ratio
from studio_state.history import History
from studio_state.history_page import Run, read_page
from studio_state.pipeline import Pipeline, Step
from studio_state.problems import describe_range, pipeline_problems
from studio_state.resources import RESOURCES

SHOWN_RUNS = 60
RATIOS_SHOWN = (
    "decode_tokens_per_s",
    "score_tokens_per_s",
    "images_per_s",
    "denoising_steps_per_s",
    "denoiser_calls",
    "ttft_s",
    "visual_tokens",
    "kv_bytes",
    "weight_bytes",
    "peak_memory_bytes",
    "accuracy",
    "class_agreement",
    "perplexity",
)
_MODES = {"owns": "decides alone", "edits": "changes, together with others", "needs": "needs intact", "spoils": "breaks"}
_DIRECTIONS = {"up": "goes up", "down": "goes down", "same": "stays the same"}


def shelf(catalog: Catalog) -> list[dict[str, Any]]:
    """All methods in the order of their stages, for the list."""
    rank = {s: i for i, s in enumerate(STAGES)}
    cards = sorted(catalog.methods, key=lambda c: (rank.get(c.stage or "", len(STAGES)), c.title.lower()))
    return [{"id": c.id, "title": c.title, "group": c.stage or c.kind, "summary": c.summary} for c in cards]


def method_page(card: Card, catalog: Catalog, unavailable: Mapping[str, str]) -> dict[str, Any]:
    """Everything about a method that is known without a run.

    Args:
        unavailable: method id -> why it cannot run on this machine.
    """
    return {
        "id": card.id, "title": card.title, "summary": card.summary, "doc": paragraphs(card.doc, card.summary), "kind": card.kind,
        "stage": card.stage, "stages": list(STAGES), "paper": paper_of(card), "unavailable": unavailable.get(card.id, ""),
        "facts": [[label, text] for label, text in _facts(card, catalog) if text],
        "knobs": knob_rows(card),
        "moves": [*_moves(card.effects, "checked by a test"), *_moves(card.hopes, "hoped for, measured in every run")],
        "resources": [{"resource": u.resource, "what": RESOURCES[u.resource], "mode": _MODES[u.mode], "when": _when(u.when)} for u in card.resources],
        "conflicts": conflicts(card, catalog),
    }  # fmt: skip


def paper_of(card: Card) -> dict[str, str]:
    """The reference as text, with its address where it is an arXiv id."""
    number = card.paper.removeprefix("arXiv:")
    return {"text": card.paper, "link": f"https://arxiv.org/abs/{number}" if number != card.paper else ""}


def paragraphs(doc: str, summary: str) -> list[str]:
    """The docstring in paragraphs, its first sentence left out where it repeats the summary."""
    parts = [" ".join(p.split()) for p in doc.split("\n\n")]
    return [p for p in parts if p and p.rstrip(".") != summary.rstrip(".")]


def knob_rows(card: Card) -> list[dict[str, str]]:
    """Name, what is allowed, default, and which way it moves things."""
    neutral = card.neutral or {}
    return [
        {
            "name": name, "allowed": describe_range(prop), "default": _value(prop.get("default")),
            "help": str(prop.get("description", "")), "neutral": _value(neutral[name]) if name in neutral else "",
        }
        for name, prop in card.knobs.get("properties", {}).items()
    ]  # fmt: skip


def _value(value: Any) -> str:
    return (
        "nothing"
        if value is None
        else {True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    )


def _facts(card: Card, catalog: Catalog) -> Iterator[tuple[str, str]]:
    if card.kind == "recipe":
        yield "Makes", ", ".join(card.families) + " models: a checkpoint with its model card"
        yield "Command", f"pareto-studio train {card.id} --out DIR"
        return
    yield "Works on", ", ".join(card.families) + " models" + (f" with {', '.join(card.traits)}" if card.traits else "")
    yield "Not on", ", ".join(card.not_traits)
    workloads = [catalog.workload_by_id[w].title for w in card.workloads if w in catalog.workload_by_id]
    yield "Workloads", ", ".join(workloads) if card.workloads else "all of its families"
    yield "Needs here", ", ".join(card.requires)
    yield "Number formats", ", ".join(card.dtypes)
    yield "Devices", ", ".join(card.devices)
    yield "Batch", f"at most {card.max_batch}" if card.max_batch else ""
    if card.neutral is not None:
        at = " and ".join(f"{k} = {_value(v)}" for k, v in card.neutral.items()) or "every setting"
        yield "Same as baseline", f"at {at}, token for token"
    else:
        yield "Same as baseline", f"at no setting: {card.not_neutral_because}" if card.not_neutral_because else "at no setting"


def _moves(directions: Mapping[str, str], how: str) -> list[dict[str, str]]:
    return [{"metric": metric_title(m), "way": _DIRECTIONS[d], "how": how} for m, d in directions.items()]


def _when(when: Mapping[str, list[Any]]) -> str:
    return " and ".join(f"{k} = {' or '.join(map(_value, v))}" for k, v in when.items())


# -- what it cannot stand with -----------------------------------------------------------------------------------------


def conflicts(card: Card, catalog: Catalog) -> list[dict[str, str]]:
    """Other policies that cannot stand in a pipeline with this one: which, why, and at which knobs if not at all."""
    if card.kind != "policy":
        return []
    found = []
    for other in catalog.policies:
        if other.id == card.id:
            continue
        tried = [
            (mine, theirs, _clash(card, mine, other, theirs, catalog)) for mine in variants(card) for theirs in variants(other)
        ]
        bad = [t for t in tried if t[2]]
        if bad:
            mine, theirs, why = bad[0]
            only = "" if len(bad) == len(tried) else " and ".join(filter(None, (_knobs(card, mine), _knobs(other, theirs))))
            found.append({"id": other.id, "title": other.title, "why": why, "only": f"only with {only}" if only else ""})
    return found


def variants(card: Card) -> list[dict[str, Any]]:
    """Knob settings that differ in what the card says about resources: the default, and each value named in a ``when``."""
    named: dict[str, list[Any]] = {}
    for use in card.resources:
        for knob, values in use.when.items():
            named.setdefault(knob, [card.defaults().get(knob)])
            named[knob] += [v for v in values if v not in named[knob]]
    return [dict(zip(named, values, strict=True)) for values in product(*named.values())]


def _clash(card: Card, mine: dict[str, Any], other: Card, theirs: dict[str, Any], catalog: Catalog) -> str:
    """Why the two cannot stand together at these knobs; empty if they can."""
    steps = (Step(policy=card.id, knobs=mine), Step(policy=other.id, knobs=theirs))
    alone = {p.message for s in steps for p in pipeline_problems(Pipeline(steps=(s,)), catalog)}
    found = pipeline_problems(Pipeline(steps=steps).ordered(catalog), catalog)
    return next((p.message for p in found if p.message not in alone), "")


def _knobs(card: Card, knobs: Mapping[str, Any]) -> str:
    return ", ".join(f"{card.title}'s {k} = {_value(v)}" for k, v in knobs.items())


# -- the runs that used it ---------------------------------------------------------------------------------------------


def runs_of(history: History, policy: str) -> dict[str, Any]:
    """The latest runs with this policy, the ones that went badly like the others, and a sentence that counts them."""
    page = read_page(history, size=SHOWN_RUNS, policy=policy)
    runs = [
        r
        for e in page.experiments
        for r in page.runs[e.id]
        if any(s.get("policy") == policy for s in r.row.steps.get("steps") or [])
    ]
    rows = [run_row(r) for r in runs]
    worse, idle = sum("worse" in {c["verdict"] for c in r["ratios"]} for r in rows), sum(r["no_effect"] for r in rows)
    failed = sum(r["status"] not in ("finished", "running", "queued") for r in rows)
    counts = [
        f"{len(rows)} {'run' if len(rows) == 1 else 'runs'} here" + (f" in the latest {SHOWN_RUNS} of {page.total} experiments" if page.total > SHOWN_RUNS else ""),
        f"{worse} with something worse than the reference" if worse else "",
        f"{idle} without any effect" if idle else "",
        f"{failed} that did not finish" if failed else "",
    ]  # fmt: skip
    return {"rows": rows, "summary": "; ".join(filter(None, counts)) + "." if rows else ""}


def no_runs(card: Card) -> dict[str, Any]:
    """In the place of :func:`runs_of` for what no lane can hold."""
    how = f"it trains a model: pareto-studio train {card.id} --out DIR, then run it with --model DIR"
    return {"rows": [], "summary": f"A {card.kind} stands in no lane" + (f"; {how}." if card.kind == "recipe" else ".")}


def run_row(run: Run) -> dict[str, Any]:
    """One run: what it was, its ratios to the reference with verdicts, and what was remarked."""
    ratios = []
    for name in RATIOS_SHOWN:
        r = run.ratios.get(name)
        if r is not None and not (r.value == 1.0 and name in ("kv_bytes", "weight_bytes")):
            event = Ratio(lane=0, name=name, value=r.value, low=r.low, high=r.high)
            ratios.append(
                {
                    "metric": metric_title(name),
                    "text": ratio_text(r.value),
                    "interval": interval_text(r.low, r.high),
                    "verdict": verdict(name, event),
                }
            )
    flags = [*run.row.flags, *([run.row.message] if run.row.message else [])]
    return {
        "id": id_of(run.key), "name": short_name(run), "pipeline": run.row.pipeline, "status": run.row.status, "when": clock_time(run.experiment.submitted),
        "model": model_title(run.experiment.model), "workload": run.experiment.workload or "", "ratios": ratios, "flags": flags,
        "no_effect": any(f.startswith("no effect") for f in flags),
    }  # fmt: skip
