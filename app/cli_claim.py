"""``claim``: run the experiments of a claim, judge them, keep the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from app.cli_lists import print_json, print_table
from app.cli_run import CANCELLED_BY_CTRL_C, watch
from app.cli_spec import check
from app.dispatch import LocalDispatch
from app.dispatch.runner import Settings
from studio_state.catalog import Catalog
from studio_state.claims import Claim, load_claims
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec
from studio_state.journal import append_entries
from studio_state.paths import DataDir
from studio_state.problems import Problem
from studio_state.results import Results, results_of
from studio_state.verdicts import Verdict, judge


def show_claims(as_json: bool) -> None:
    """All claims: what they say, how long they take, since when their thresholds stand."""
    claims = list(load_claims().values())
    if as_json:
        return print_json([c.model_dump(mode="json") for c in claims])
    rows = [(c.id, c.headline, f"{c.minutes:g} min", c.thresholds_set, c.reference) for c in claims]
    print_table(("claim", "headline", "takes about", "thresholds set", "paper"), rows)


def run_claim(claim: Claim, data: DataDir, settings: Settings, model: str | None, device: str, as_json: bool) -> int:
    """Run everything a claim asks for in one worker, judge it, and write the verdict to the journal.

    Args:
        model: another model than the claim's own.

    Returns:
        The exit status: 0 whatever the verdict, 130 after Ctrl-C.

    Raises:
        SpecError: an experiment cannot run.
        StudioError: an experiment or a lane failed, or the verdict cannot be recorded.
    """
    specs = specs_of(claim, model, device)
    results = run_all(specs, data, settings)
    if results is None:
        return CANCELLED_BY_CTRL_C
    verdict = judge(claim, results)
    append_entries(data.journal, verdict.entries(by="cli"))
    if as_json:
        print_json({**verdict.model_dump(mode="json"), "headline": claim.headline})
    else:
        print_verdict(claim, verdict)
    return 0


def specs_of(claim: Claim, model: str | None, device: str) -> dict[str, ExperimentSpec]:
    """The claim's experiments as they are submitted, checked as far as is possible without the model.

    Raises:
        SpecError: all problems of all experiments.
    """
    specs = {e.id: e.spec(model, device) for e in claim.experiments}
    found: list[Problem] = []
    for spec in specs.values():
        try:
            check(spec, Catalog.load())
        except SpecError as e:
            found += e.problems
    if found:
        raise SpecError(found)
    return specs


def run_all(specs: dict[str, ExperimentSpec], data: DataDir, settings: Settings) -> dict[str, Results] | None:
    """Run experiments one after the other on one warm worker; None if Ctrl-C was pressed."""
    errors = Console(stderr=True, highlight=False)
    results: dict[str, Results] = {}
    devices = tuple(dict.fromkeys(spec.device for spec in specs.values()))
    with LocalDispatch(data, devices, settings=settings) as dispatch:
        for number, (name, spec) in enumerate(specs.items(), 1):
            errors.print(f"experiment {number} of {len(specs)}: {name}, {_lanes(spec)}", markup=False, style="dim")
            events, interrupted = watch(dispatch, dispatch.submit(spec, owner="cli", origin="claim"), errors)
            if interrupted:
                return None
            results[name] = results_of(events)
            if results[name].status != "finished":
                break  # the judge says why
    return results


def print_verdict(claim: Claim, verdict: Verdict) -> None:
    """The verdict, one line a check, and which runs it rests on."""
    console = Console(highlight=False)
    lines = [f"{claim.title}: {verdict.verdict}", verdict.text]
    lines += [f"- {r.sentence()}" + ("" if r.headline else " (beside the headline)") for r in verdict.checks]
    where = f"on {verdict.model or 'the model'}, {verdict.device or 'this device'}"
    lines.append(f"{where}; runs: {_runs(verdict.runs)}; thresholds set {claim.thresholds_set}")
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _runs(runs: dict[str, Any]) -> str:
    return ", ".join(f"{name} {run}" for name, run in runs.items())


def _lanes(spec: ExperimentSpec) -> str:
    texts: Sequence[str] = [p.text() for p in spec.lanes]
    return f"{spec.workload.id} with {len(texts)} lanes: {', '.join(texts)}"
