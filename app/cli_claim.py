"""``claim``: run the experiments of a claim, judge them, keep the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from app.claim_run import check_claim, specs_of
from app.cli_lists import print_json, print_table
from app.cli_run import CANCELLED_BY_CTRL_C, watch
from app.dispatch import LocalDispatch
from app.dispatch.runner import Settings
from studio_state.catalog import Catalog
from studio_state.claims import Claim, load_claims
from studio_state.experiment import ExperimentSpec
from studio_state.journal import append_entries
from studio_state.paths import DataDir
from studio_state.problems import problems
from studio_state.results import Results, results_of
from studio_state.verdicts import Verdict


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
    catalog = Catalog.load()
    specs = specs_of(claim, model, device, lambda spec: problems(spec, catalog))
    errors = Console(stderr=True, highlight=False)
    devices = tuple(dict.fromkeys(spec.device for spec in specs.values()))
    with LocalDispatch(data, devices, settings=settings) as dispatch:

        def run_one(name: str, spec: ExperimentSpec) -> Results | None:
            errors.print(
                f"experiment {list(specs).index(name) + 1} of {len(specs)}: {name}, {_lanes(spec)}", markup=False, style="dim"
            )
            events, interrupted = watch(dispatch, dispatch.submit(spec, owner="cli", origin="claim"), errors)
            return None if interrupted else results_of(events)

        verdict = check_claim(claim, specs, run_one, lambda entries: append_entries(data.journal, entries), by="cli")
    if verdict is None:
        return CANCELLED_BY_CTRL_C
    if as_json:
        print_json({**verdict.model_dump(mode="json"), "headline": claim.headline})
    else:
        print_verdict(claim, verdict)
    return 0


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
