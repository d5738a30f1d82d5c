"""Judging a claim by what its experiments left behind. Pure arithmetic on intervals.

**One check.** The estimate comes with its 95 % interval (counts and bytes are exact: their interval is
themselves). Then

* a check that asks for a gain (its limit lies at or beyond "nothing changed", which is 1 for ratios and
  0 for differences) is *reproduced* if the whole interval keeps to the limit, *direction only* if not
  but the whole interval lies on the gaining side of "nothing changed", else *not shown*;
* a check that allows a loss (its limits leave "nothing changed" inside, or it has two limits) is
  *reproduced* if the whole interval keeps to the limits, *direction only* if only the estimate does,
  else *not shown*;
* a timed or sampled number without an interval (a single pair, or lanes that did not run in turn), or of
  a lane whose policy had no effect, is *not shown*;
* a lane that does not fit on the device, or a needed check that is not reproduced (a baseline that cannot
  do the task), makes it *cannot be shown on this hardware*.

**The claim** comes out as its worst headline check, in the order not shown, cannot be shown, direction
only, reproduced; while a part of the headline is unchecked it is *direction only* at best.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from studio_state.claims import Check, Claim
from studio_state.errors import StudioError
from studio_state.estimates import Estimate, estimated
from studio_state.journal import GiveVerdict
from studio_state.results import Results

Outcome = Literal["reproduced", "direction only", "not shown", "cannot be shown on this hardware"]
REPRODUCED: Outcome = "reproduced"
DIRECTION: Outcome = "direction only"
NOT_SHOWN: Outcome = "not shown"
CANNOT: Outcome = "cannot be shown on this hardware"
_WORST_FIRST = (NOT_SHOWN, CANNOT, DIRECTION, REPRODUCED)


class CheckResult(BaseModel):
    """How one check came out. ``sentence`` says it in words with the numbers."""

    model_config = ConfigDict(frozen=True)
    id: str
    text: str
    metric: str
    headline: bool
    outcome: Outcome
    asked: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    reason: str = ""

    def sentence(self) -> str:
        """What was found, what was asked for, and why it is not more."""
        found = "no number" if self.value is None else _number(self.value)
        if self.low is not None and self.high is not None and self.low != self.high:
            found += f" [{_number(self.low)} to {_number(self.high)}]"
        return f"{self.outcome}: {self.text} ({self.metric} {found}; asked for {self.asked})" + (
            f": {self.reason}" if self.reason else ""
        )


class Verdict(BaseModel):
    """How a claim came out.

    Attributes:
        runs: experiment of the claim -> id of what was run.
        digest: of the claim's experiments and limits.
    """

    model_config = ConfigDict(frozen=True)
    claim: str
    verdict: Outcome
    text: str
    checks: tuple[CheckResult, ...]
    runs: dict[str, str]
    model: str
    device: str
    digest: str

    def entries(self, by: str = "") -> list[GiveVerdict]:
        """One journal entry for each of the experiments, each with all numbers."""
        numbers: dict[str, Any] = self.model_dump(mode="json", include={"checks", "runs", "model", "device", "digest"})
        return [
            GiveVerdict(experiment=run, by=by, claim=self.claim, verdict=self.verdict, text=self.text, numbers=numbers)
            for run in dict.fromkeys(self.runs.values())
        ]


def judge(claim: Claim, results: Mapping[str, Results]) -> Verdict:
    """The verdict, by the rules at the top of the module.

    Args:
        results: experiment of the claim -> what came of it.

    Raises:
        StudioError: an experiment is missing, did not finish, or a lane of it failed.
    """
    for wanted in claim.experiments:
        _require_finished(claim, wanted.id, results.get(wanted.id))
    found: dict[str, CheckResult] = {}
    for check in claim.checks:
        found[check.id] = _judge(check, results, found)
    verdict = overall(claim, list(found.values()))
    first = results[claim.experiments[0].id]
    return Verdict(
        claim=claim.id,
        verdict=verdict,
        text=_text(claim, verdict, list(found.values())),
        checks=tuple(found.values()),
        runs={e.id: results[e.id].experiment for e in claim.experiments},
        model=first.model.name if first.model else "",
        device=str(first.environment.get("device_name", "")),
        digest=claim.digest(),
    )


def overall(claim: Claim, checks: Sequence[CheckResult]) -> Outcome:
    """The worst headline check; direction only at best while a part of the headline is unchecked."""
    worst = min((c.outcome for c in checks if c.headline), key=_WORST_FIRST.index)
    return DIRECTION if worst == REPRODUCED and claim.unchecked else worst


def _require_finished(claim: Claim, name: str, results: Results | None) -> None:
    if results is None:
        raise StudioError(f"claim {claim.id}: experiment {name} was not run; run all of them and judge again")
    if results.status != "finished":
        raise StudioError(
            f"claim {claim.id}: experiment {name} ended as {results.status}: {results.message or 'no reason given'}; run it again"
        )
    for index, lane in enumerate(results.lanes):
        if lane.status not in ("finished", "unavailable"):
            raise StudioError(
                f"claim {claim.id}: lane {index} of experiment {name} ended as {lane.status}: {lane.message}; run it again"
            )


def _judge(check: Check, results: Mapping[str, Results], before: Mapping[str, CheckResult]) -> CheckResult:
    lanes = [results[name].lanes[i] for name in filter(None, (check.experiment, check.than)) for i in check.lanes()]
    unmet = next((before[n] for n in check.needs if before[n].outcome != REPRODUCED), None)
    away = next((lane for lane in lanes if lane.status == "unavailable"), None)
    idle = next((flag for lane in lanes for flag in lane.flags if flag.startswith("no effect")), "")
    if away is not None:
        return _result(check, CANNOT, Estimate(None), away.message)
    estimate = estimated(check, results)
    if unmet is not None:
        return _result(check, CANNOT, estimate, f"it needs that {unmet.text}, which is {unmet.outcome} with this model")
    if idle or estimate.why_not or estimate.value is None:
        return _result(check, NOT_SHOWN, estimate, idle or estimate.why_not or "the metric was not taken")
    return _result(check, outcome(check, estimate), estimate, "")


def outcome(check: Check, estimate: Estimate) -> Outcome:
    """Compare an estimate that has an interval with the limits of its check."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return NOT_SHOWN
    neutral = check.neutral
    if check.kind == "ordering":
        return REPRODUCED if low > 0 else NOT_SHOWN
    least = -math.inf if check.at_least is None else check.at_least
    most = math.inf if check.at_most is None else check.at_most
    if least <= low and high <= most:
        return REPRODUCED
    if neutral is not None and check.at_most is None and least >= neutral:
        return DIRECTION if low > neutral else NOT_SHOWN
    if neutral is not None and check.at_least is None and most <= neutral:
        return DIRECTION if high < neutral else NOT_SHOWN
    return DIRECTION if least <= value <= most else NOT_SHOWN


# -- words -------------------------------------------------------------------------------------
def asked(check: Check) -> str:
    """The limits in words."""
    if check.kind == "ordering":
        return "lanes " + " < ".join(map(str, check.order))
    limits = [f"at least {_number(check.at_least)}" if check.at_least is not None else ""]
    limits.append(f"at most {_number(check.at_most)}" if check.at_most is not None else "")
    return " and ".join(filter(None, limits))


def _result(check: Check, outcome: Outcome, e: Estimate, reason: str) -> CheckResult:
    return CheckResult(
        id=check.id, text=check.text, metric=check.metric, headline=check.headline, outcome=outcome, asked=asked(check),
        value=e.value, low=e.low, high=e.high, n=e.n, reason=reason,
    )  # fmt: skip


def _text(claim: Claim, verdict: Outcome, checks: Sequence[CheckResult]) -> str:
    counted = [c for c in checks if c.headline]
    held = sum(c.outcome == REPRODUCED for c in counted)
    parts = [f"{held} of {len(counted)} checks of the headline are reproduced."]
    if claim.unchecked:
        parts.append("Not checked: " + "; ".join(claim.unchecked) + ".")
    if verdict != REPRODUCED:
        parts.append(claim.fallback)
    return " ".join(parts)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
