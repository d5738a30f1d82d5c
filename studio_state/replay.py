"""Then and now: is an experiment that was run again the same, and if not, why. Pure.

Both sides are documents: a run card or what ``--json`` writes; they share the names that are read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from studio_state.metrics import METRICS
from studio_state.runcard import output_digest

SPEED_TOLERANCE = 0.10
QUALITY_TOLERANCE = 1e-4
PROCESS_TOLERANCE = 0.05
_OF_THE_PROCESS = ("worker_rss_bytes", "peak_memory_bytes", "peak_activation_bytes")
_SETUP = {
    "python": "Python",
    "device": "device",
    "device_name": "processor",
    "threads": "number of CPU threads",
    "platform": "system",
}
Same = Literal["same", "different"]
Document = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """One number of one lane, then and now.

    Attributes:
        allowed: in words, what still counts as the same.
        binding: a difference means that the result was not reproduced (speed differs from machine to machine).
    """

    lane: int
    metric: str
    before: float | None
    now: float | None
    verdict: Same
    allowed: str
    binding: bool


@dataclass(frozen=True)
class ComparedOutputs:
    """Outputs of one lane: how many are the same, token by token; ``first`` is the first item that differs."""

    lane: int
    same: int
    total: int
    first: str = ""


@dataclass(frozen=True)
class Comparison:
    """How a run came out beside an earlier one.

    Attributes:
        verdict: same if every count, size, quality and output is; speed may differ.
        rows: metrics; ``ratios``: of speeds to the reference lane, the same where the intervals overlap.
        why: what differs in the set-up, as sentences; it explains differences and may stand beside none.
    """

    verdict: Same
    rows: list[Compared]
    ratios: list[Compared]
    outputs: list[ComparedOutputs]
    why: list[str]

    def sentences(self) -> list[str]:
        """The verdict for people."""
        differ = [r for r in self.rows if r.verdict == "different" and r.binding]
        found = [
            f"{self.verdict}: {sum(r.verdict == 'same' for r in self.rows)} of {len(self.rows)} metrics are the same; "
            f"{len(differ)} that should be the same differ"
        ]
        for o in self.outputs:
            said = "" if o.same == o.total else f"; the first that differs is {o.first}"
            found.append(f"lane {o.lane}: {o.same} of {o.total} outputs are the same, token by token{said}")
        return found + self.why


def compare_runs(before: Document, now: Document) -> Comparison:
    """Compare two documents of one experiment, lane by lane."""
    rows, outputs = compare(before, now), compare_outputs(before, now)
    lanes = [list(d.get("lanes", [])) for d in (before, now)]
    alike = bool(rows) and len(lanes[0]) == len(lanes[1])
    alike = alike and all(r.verdict == "same" or not r.binding for r in rows) and all(o.same == o.total for o in outputs)
    alike = alike and all(a.get("status") == b.get("status") for a, b in zip(*lanes, strict=True))
    return Comparison("same" if alike else "different", rows, compare_ratios(before, now), outputs, set_up(before, now))


def compare(before: Document, now: Document) -> list[Compared]:
    """All metrics that both documents have, lane by lane, in the order of ``METRICS``."""
    found: list[Compared] = []
    for old, new in zip(before.get("lanes", []), now.get("lanes", []), strict=False):
        both = old["metrics"].keys() & new["metrics"].keys()
        names = [n for n in METRICS if n in both] + sorted(both - METRICS.keys())
        found += [_compared(new["lane"], n, old["metrics"][n], new["metrics"][n]) for n in names]
    return found


def _compared(lane: int, name: str, before: float | None, now: float | None) -> Compared:
    group = METRICS[name].group if name in METRICS else "count"
    tolerance = {"speed": SPEED_TOLERANCE, "quality": QUALITY_TOLERANCE}.get(
        group, PROCESS_TOLERANCE if name in _OF_THE_PROCESS else 0.0
    )
    if before is None or now is None:
        same = before is now
    else:
        same = math.isclose(before, now, rel_tol=tolerance, abs_tol=QUALITY_TOLERANCE if group == "quality" else 0.0)
    allowed = f"within {tolerance:.0%}" if tolerance >= 0.01 else f"within {tolerance:g}" if tolerance else "equal"
    return Compared(
        lane, name, before, now, "same" if same else "different", allowed, group in ("quality", "count") or tolerance == 0
    )


def compare_ratios(before: Document, now: Document) -> list[Compared]:
    """Ratios of speeds to the reference lane: they hold on another machine where the speeds do not."""
    found: list[Compared] = []
    for old, new in zip(before.get("lanes", []), now.get("lanes", []), strict=False):
        for name, then in old.get("ratios", {}).items():
            other = new.get("ratios", {}).get(name)
            if other and name in METRICS and METRICS[name].group == "speed":
                same: Same = "same" if _overlap(then, other) else "different"
                found.append(Compared(new["lane"], name, then["value"], other["value"], same, "intervals overlap", False))
    return found


def _overlap(a: Document, b: Document) -> bool:
    low, high = ([x[k] if x.get(k) is not None else x["value"] for x in (a, b)] for k in ("low", "high"))
    return bool(max(low) <= min(high))


def compare_outputs(before: Document, now: Document) -> list[ComparedOutputs]:
    """Outputs that both documents have, by item and repeat."""
    found = []
    for old, new in zip(before.get("lanes", []), now.get("lanes", []), strict=False):
        then, here = ({(o["item"], o.get("repeat", 0)): _digest(o) for o in x.get("outputs", [])} for x in (old, new))
        keys = [k for k in then if k in here]
        differ = [k for k in keys if then[k] != here[k]]
        if keys:
            found.append(ComparedOutputs(new["lane"], len(keys) - len(differ), len(keys), differ[0][0] if differ else ""))
    return found


def _digest(output: Document) -> str:
    return str(output.get("digest") or output_digest(output.get("text", ""), output.get("data", {}).get("token_ids")))


def set_up(before: Document, now: Document) -> list[str]:
    """What differs in request, model, items, versions and device: one sentence each."""
    old, new = before.get("experiment", {}), now.get("experiment", {})
    found = [
        f"asked for differently: {k} was {a!r}, is {b!r}" for k, a, b in _changes(old.get("spec") or {}, new.get("spec") or {})
    ]
    for name, text in (("model_digest", "the model's file is another one"), ("workload_digest", "the items are other ones")):
        if old.get(name) and new.get(name) and old[name] != new[name]:
            found.append(f"{text}: {str(old[name])[:12]} then, {str(new[name])[:12]} now")
    was, is_ = old.get("environment") or {}, new.get("environment") or {}
    found += [
        f"another {words}: {was[k]} then, {is_[k]} now"
        for k, words in _SETUP.items()
        if k in was and k in is_ and was[k] != is_[k]
    ]
    found += [
        f"another version of {k}: {a} then, {b} now" for k, a, b in _changes(was.get("versions") or {}, is_.get("versions") or {})
    ]
    found += [f"other load {when}: {e['other_load']}" for e, when in ((was, "then"), (is_, "now")) if e.get("other_load")]
    return found


def _changes(old: Document, new: Document) -> list[tuple[str, Any, Any]]:
    return [(k, old[k], new[k]) for k in old if k in new and old[k] != new[k]]
