"""What the papers page shows, as plain data: the list of systems, a claim in words, and the verdicts on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from app.compare_runs import clock_time, model_title
from app.components.numbers import digits, interval_text, metric_quantity, metric_title, ratio_text
from studio_state.catalog import Catalog
from studio_state.claims import Check, Claim, ClaimExperiment
from studio_state.papers import Paper
from studio_state.store_rows import VerdictRow
from studio_state.verdicts import asked

Data = dict[str, Any]
WITH_CLAIM, RUNS_HERE, NOT_BUILT = "With a claim to check", "Runs here", "Not built yet"
_KINDS = {"ratio": "{a} / {b}", "difference": "{a} − {b}", "growth": "{a} / {b}", "value": "{a}"}


# -- the list ----------------------------------------------------------------------------------------------------------
def paper_list(
    papers: Iterable[Paper], claims: Mapping[str, Claim], links: Callable[[str], str], last: Callable[[str], Data]
) -> list[Data]:
    """Every system in three groups, the newest first in each; claims on other papers stand in the first group too.

    Args:
        links: method id -> packed state of the Studio tab with this method alone in a lane; empty = it cannot be put there.
        last: claim id -> ``verdict`` of its last check, if any, and whether it is ``running`` now.
    """
    papers = list(papers)
    by_paper: dict[str, list[Claim]] = {p.id: [] for p in papers}
    others = [c for c in claims.values() if c.paper not in by_paper]
    for claim in claims.values():
        by_paper.get(claim.paper, []).append(claim)
    rows = [_paper_row(p, by_paper[p.id], links, last) for p in papers] + [_other_row(c, links, last) for c in others]
    order = (WITH_CLAIM, RUNS_HERE, NOT_BUILT)
    rows.sort(key=lambda r: r["date"], reverse=True)
    return sorted(rows, key=lambda r: order.index(r["group"]))


def _paper_row(paper: Paper, claims: Sequence[Claim], links: Callable[[str], str], last: Callable[[str], Data]) -> Data:
    return {
        "id": paper.id, "title": paper.title, "date": paper.date, "summary": paper.summary, "listed": True,
        "facts": [paper.date, ", ".join(paper.families), paper.role, f"card {paper.card}"], "status": paper.status(),
        "runs_as": _methods(paper.runs_as, links), "claims": [_claim_name(c, last) for c in claims],
        "group": WITH_CLAIM if claims else RUNS_HERE if paper.runs_as else NOT_BUILT,
    }  # fmt: skip


def _other_row(claim: Claim, links: Callable[[str], str], last: Callable[[str], Data]) -> Data:
    """A claim whose paper is not on the list: its lanes say what runs."""
    runs_as = methods_of(claim)
    return {
        "id": f"claim-{claim.id}", "title": claim.title, "date": "", "summary": claim.headline, "listed": False,
        "facts": [claim.reference, "not on the reading list"], "status": f"runs here as {', '.join(runs_as)}",
        "runs_as": _methods(runs_as, links), "claims": [_claim_name(claim, last)], "group": WITH_CLAIM,
    }  # fmt: skip


def methods_of(claim: Claim) -> tuple[str, ...]:
    """Policies of its lanes, in order of appearance."""
    specs = [e.spec() for e in claim.experiments]
    return tuple(dict.fromkeys(s.policy for spec in specs for lane in spec.lanes for s in lane.steps))


def _methods(ids: Iterable[str], links: Callable[[str], str]) -> list[Data]:
    return [{"id": i, "link": links(i)} for i in ids]


def _claim_name(claim: Claim, last: Callable[[str], Data]) -> Data:
    return {"id": claim.id, "title": claim.title, **last(claim.id)}


# -- a claim -----------------------------------------------------------------------------------------------------------
def claim_page(claim: Claim, catalog: Catalog) -> Data:
    """What the claim says, what runs, what must hold and since when."""
    return {
        "id": claim.id, "title": claim.title, "headline": claim.headline, "source": claim.source,
        "reference": _reference(claim.reference), "takes": f"about {claim.minutes:g} min on two CPU cores",
        "runs": [_experiment_row(e, catalog) for e in claim.experiments],
        "checks": [_check_row(c, claim) for c in claim.checks],
        "unchecked": list(claim.unchecked), "fallback": claim.fallback, "set": claim.thresholds_set,
        "log": [[e.date, e.reason] for e in claim.log],
    }  # fmt: skip


def _reference(text: str) -> dict[str, str]:
    number = text.removeprefix("arXiv:")
    return {"text": text, "link": f"https://arxiv.org/abs/{number}" if number != text else ""}


def _experiment_row(experiment: ClaimExperiment, catalog: Catalog) -> Data:
    card = catalog.workload_by_id.get(experiment.workload.id)
    settings = {**experiment.workload.options, **experiment.settings}
    return {
        "id": experiment.id, "model": model_title(experiment.model), "workload": card.title if card else experiment.workload.id,
        "settings": ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in settings.items()), "lanes": list(experiment.lanes),
    }  # fmt: skip


def _check_row(check: Check, claim: Claim) -> Data:
    lanes = {e.id: e.lanes for e in claim.experiments}[check.experiment]
    if check.kind == "ordering":
        what = " < ".join(lanes[i] for i in check.order)
    else:
        what = _KINDS[check.kind].format(a=lanes[check.lane], b=lanes[check.against])
    return {
        "text": check.text, "compared": f"{metric_title(check.metric)}: {what}", "where": f"in {check.experiment}" + (f" against {check.than}" if check.than else ""),
        "asked": "rises step by step" if check.kind == "ordering" else asked(check), "source": check.source, "headline": check.headline,
    }  # fmt: skip


# -- verdicts ----------------------------------------------------------------------------------------------------------
def verdict_list(rows: Iterable[VerdictRow], claim: Claim) -> list[Data]:
    """Verdicts on a claim as given, each once however many experiments it rests on."""
    seen: dict[str, Data] = {}
    for row in rows:
        runs = row.numbers.get("runs") or {"": row.experiment}
        seen.setdefault(json.dumps(runs, sort_keys=True), _verdict_row(row, runs, claim))
    return list(seen.values())


def _verdict_row(row: VerdictRow, runs: Mapping[str, str], claim: Claim) -> Data:
    same, order = row.numbers.get("digest") == claim.digest(), [e.id for e in claim.experiments]
    runs = dict(sorted(runs.items(), key=lambda run: order.index(run[0]) if run[0] in order else len(order)))
    checks = {c.id: c for c in claim.checks} if same else {}
    return {
        "verdict": row.verdict, "when": clock_time(row.t), "text": row.text, "runs": [[name, run] for name, run in runs.items()],
        "where": ", ".join(filter(None, (model_title(str(row.numbers.get("model") or "")), str(row.numbers.get("device") or "")))),
        "changed": "" if same else "The checks of this claim were other ones then.",
        "checks": [_found_row(c, checks.get(str(c.get("id")))) for c in row.numbers.get("checks") or []],
    }  # fmt: skip


def _found_row(found: Mapping[str, Any], check: Check | None) -> Data:
    """One check of a verdict: what came out, its interval, and what was asked for."""
    low, high = found.get("low"), found.get("high")
    value, interval = found_numbers(check.kind if check else "", str(found.get("metric") or ""), found.get("value"), low, high)
    return {
        "text": str(found.get("text") or ""), "metric": metric_title(str(found.get("metric") or "")), "value": value, "n": int(found.get("n") or 0),
        "interval": "exact" if low is not None and low == high else interval, "asked": str(found.get("asked") or ""),
        "outcome": str(found.get("outcome") or ""), "reason": str(found.get("reason") or ""), "headline": bool(found.get("headline", True)),
    }  # fmt: skip


def found_numbers(kind: str, metric: str, value: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """A value and its interval as text: ratios with ×, values in their unit, differences and steps as plain numbers."""
    if kind in ("ratio", "growth"):
        return ratio_text(value), interval_text(low, high)
    if kind == "value":
        ends = [str(metric_quantity(metric, x)) for x in (low, high) if x is not None]
        return str(metric_quantity(metric, value)), " to ".join(ends) if len(ends) == 2 else ""
    plain = [digits(x) if x is not None else "" for x in (value, low, high)]
    return plain[0] or ratio_text(None), f"{plain[1]} to {plain[2]}" if plain[1] and plain[2] else ""
