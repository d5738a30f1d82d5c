"""Checking a claim: its experiments one after the other, the judge, the journal. The command line and the papers page both do this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from studio_state.claims import Claim
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec
from studio_state.journal import GiveVerdict
from studio_state.problems import Problem
from studio_state.results import Results
from studio_state.verdicts import Verdict, judge

RunOne = Callable[[str, ExperimentSpec], "Results | None"]
Keep = Callable[[Sequence[GiveVerdict]], None]


def specs_of(
    claim: Claim, model: str | None, device: str, problems_of: Callable[[ExperimentSpec], Sequence[Problem]]
) -> dict[str, ExperimentSpec]:
    """The claim's experiments as they are submitted, checked as far as is possible without the model.

    Args:
        model: another model than the claim's own.
        problems_of: what keeps an experiment from running.

    Raises:
        SpecError: all problems of all experiments.
    """
    specs = {e.id: e.spec(model, device) for e in claim.experiments}
    found = [p for spec in specs.values() for p in problems_of(spec)]
    if found:
        raise SpecError(found)
    return specs


def check_claim(claim: Claim, specs: Mapping[str, ExperimentSpec], run_one: RunOne, keep: Keep, by: str) -> Verdict | None:
    """Run everything that a claim asks for, judge it, and keep the verdict.

    Args:
        specs: experiment of the claim -> what to submit; see :func:`specs_of`.
        run_one: runs an experiment to its end; None = somebody cancelled.
        keep: writes the entries into the journal.
        by: who asked, for the journal.

    Returns:
        The verdict; None after a cancel.

    Raises:
        StudioError: an experiment or a lane failed, or the verdict cannot be recorded.
    """
    results: dict[str, Results] = {}
    for name, spec in specs.items():
        found = run_one(name, spec)
        if found is None:
            return None
        results[name] = found
        if found.status != "finished":
            break  # the judge says why
    verdict = judge(claim, results)
    keep(verdict.entries(by=by))
    return verdict
