"""Claims: a paper's headline restated as checks on lanes. Data only; :mod:`studio_state.verdicts` judges.

A claim is one file in ``assets/claims``. Its thresholds are set before its first run. Changing one, or
the experiment it is taken on, needs a new entry in the claim's ``log`` with date and reason; a test
compares the digest of what is checked with the newest entry.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from studio_state.catalog import asset
from studio_state.errors import SpecError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.metrics import METRICS
from studio_state.pipeline import parse_pipeline

_FORBID = ConfigDict(frozen=True, extra="forbid")
DEFAULT_MODEL = "smollm2-135m"


class ClaimExperiment(BaseModel):
    """One experiment of a claim.

    Attributes:
        lanes: pipelines in one line each; the first is ``baseline``.
        settings: further fields of :class:`~studio_state.experiment.ExperimentSpec`.
    """

    model_config = _FORBID
    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    model: str = DEFAULT_MODEL
    workload: WorkloadSpec
    lanes: tuple[str, ...] = Field(min_length=2)
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _baseline_first(self) -> ClaimExperiment:
        if self.lanes[0] != "baseline":
            raise ValueError(f"experiment {self.id}: the first lane is {self.lanes[0]!r}; it must be 'baseline'")
        return self

    def spec(self, model: str | None = None, device: str = "cpu") -> ExperimentSpec:
        """The experiment as it is submitted.

        Args:
            model: another model than the claim's own.
        """
        data = {
            **self.settings,
            "model": model or self.model,
            "workload": self.workload,
            "lanes": [parse_pipeline(text) for text in self.lanes],
            "device": device,
        }
        return ExperimentSpec.model_validate(data)


class Check(BaseModel):
    """One comparison of one metric.

    ========== =========================================================================== =======
    kind       what is compared with the limits                                            neutral
    ========== =========================================================================== =======
    ratio      ``lane`` / ``against``                                                      1
    difference ``lane`` - ``against``                                                      0
    growth     (``lane`` / ``against``) here / the same in the experiment ``than``         1
    ordering   the metric rises strictly along ``order``, step by step                     0
    value      ``lane`` alone                                                              none
    ========== =========================================================================== =======

    Attributes:
        text: what must hold, in words.
        source: where the limit comes from.
        at_least, at_most: the limits.
        headline: it counts for the verdict; others are told beside it.
        needs: checks without which this one means nothing (a baseline that can do the task at all).
    """

    model_config = _FORBID
    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    text: str
    source: str
    kind: Literal["ratio", "difference", "growth", "ordering", "value"]
    metric: str
    experiment: str
    lane: int = 1
    against: int = 0
    than: str = ""
    order: tuple[int, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    headline: bool = True
    needs: tuple[str, ...] = ()

    @property
    def neutral(self) -> float | None:
        """The value at which nothing has changed."""
        return {"ratio": 1.0, "growth": 1.0, "difference": 0.0, "ordering": 0.0}.get(self.kind)

    def lanes(self) -> tuple[int, ...]:
        """Lanes it looks at."""
        if self.kind == "ordering":
            return self.order
        return (self.lane,) if self.kind == "value" else (self.lane, self.against)

    @model_validator(mode="after")
    def _complete(self) -> Check:
        if self.metric not in METRICS:
            raise ValueError(f"check {self.id}: there is no metric {self.metric!r}")
        if self.kind == "ordering":
            if len(self.order) < 2 or (self.at_least, self.at_most) != (None, None):
                raise ValueError(f"check {self.id}: an ordering needs at least two lanes in 'order' and no limits")
        elif self.at_least is None and self.at_most is None:
            raise ValueError(f"check {self.id}: set at_least, at_most or both")
        if (self.kind == "growth") != bool(self.than):
            raise ValueError(f"check {self.id}: 'than' names the other experiment of a growth, and only of that")
        return self


class LogEntry(BaseModel):
    """When and why the checks became what they are."""

    model_config = _FORBID
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    digest: str = Field(pattern=r"^[0-9a-f]{16}$")
    reason: str = Field(min_length=10)


class Claim(BaseModel):
    """A headline and how it is checked.

    Attributes:
        paper: id in ``assets/papers.json``; empty for papers outside that list.
        reference: arXiv id or the like.
        headline: in our own words.
        source: what the headline is taken from.
        unchecked: parts of the headline that nothing here covers; while there are any, the verdict is
            ``direction only`` at best.
        fallback: what may be said where the headline does not show.
        log: newest entry last.
    """

    model_config = _FORBID
    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    title: str
    paper: str = ""
    reference: str
    headline: str
    source: str
    experiments: tuple[ClaimExperiment, ...] = Field(min_length=1)
    checks: tuple[Check, ...] = Field(min_length=1)
    unchecked: tuple[str, ...] = ()
    fallback: str
    minutes: float = Field(gt=0, description="about how long it takes on two CPU cores")
    log: tuple[LogEntry, ...] = Field(min_length=1)

    @property
    def thresholds_set(self) -> str:
        """Date on which the thresholds were set for the first time."""
        return self.log[0].date

    def digest(self) -> str:
        """Identity of what is run and checked: 16 hex digits over experiments, limits and unchecked parts; not the words."""
        words = {"text", "source"}
        content = {
            "experiments": [e.model_dump(mode="json") for e in self.experiments],
            "checks": [c.model_dump(mode="json", exclude=words) for c in self.checks],
            "unchecked": len(self.unchecked),
        }
        raw = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(raw.encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _hangs_together(self) -> Claim:
        lanes = {e.id: len(e.lanes) for e in self.experiments}
        known: set[str] = set()
        for check in self.checks:
            for name in filter(None, (check.experiment, check.than)):
                if name not in lanes:
                    raise ValueError(f"check {check.id}: there is no experiment {name!r} in this claim")
                if not all(0 <= lane < lanes[name] for lane in check.lanes()):
                    raise ValueError(f"check {check.id}: experiment {name} has lanes 0 to {lanes[name] - 1}")
            if not set(check.needs) <= known:
                raise ValueError(f"check {check.id}: what it needs must be a check above it")
            known.add(check.id)
        if len(known) < len(self.checks) or len(lanes) < len(self.experiments):
            raise ValueError("two checks or two experiments have the same id")
        if not any(c.headline for c in self.checks):
            raise ValueError("no check counts for the headline")
        return self


def load_claims(folder: Path | None = None) -> dict[str, Claim]:
    """All claims by id, in alphabetical order.

    Args:
        folder: another one than the packaged ``assets/claims``.

    Raises:
        SpecError: a file is not a claim, or is not named after its id.
    """
    found = {}
    for path in sorted((folder or asset("claims")).glob("*.json")):
        claim = read_claim(path)
        if claim.id != path.stem:
            raise SpecError(f"{path.name} holds the claim {claim.id!r}; name the file {claim.id}.json")
        found[claim.id] = claim
    return found


def read_claim(path: Path) -> Claim:
    """One claim from its file.

    Raises:
        SpecError: the file cannot be read or is not a claim.
    """
    try:
        return Claim.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise SpecError(f"cannot read the claim {path}: {e}; give a JSON file as in assets/claims") from e
    except ValidationError as e:
        first = e.errors()[0]
        raise SpecError(f"{path.name} is not a claim: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def find_claim(name: str) -> Claim:
    """The packaged claim with this id.

    Raises:
        SpecError: there is none.
    """
    claims = load_claims()
    if name not in claims:
        raise SpecError(f"there is no claim {name!r}; allowed: {', '.join(claims)}")
    return claims[name]
