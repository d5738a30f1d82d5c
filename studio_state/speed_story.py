"""Why a lane is as fast as it is: what its policies can touch, what the bytes allow, and where its time goes. Pure.

Reads what two analyzers left of the reference and of a lane: ``runtime-dissection`` (measured seconds by kind of operation) and
``llm-viewer`` (operations and bytes, and the least time that the device's roofline allows for them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from studio_state.catalog import Card
from studio_state.costs import amdahl, predicted_gain

KINDS: dict[str, str] = {
    "products": "linear maps",
    "unpacking": "unpacking and rounding in replaced maps",
    "attention": "attention",
    "elementwise": "norms, activations, sums",
    "moving": "copies and look-ups",
    "launching": "Python and launching",
}
MAPS, ATTENTION = ("products", "unpacking"), ("attention",)
REACH: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("weights.", MAPS),
    ("experts.", MAPS),
    ("activations.", MAPS),
    ("kv.", ATTENTION),
    ("attention.", ATTENTION),
)
"""Kinds of operation that a policy reaches through a resource; through any other resource it reaches all."""
DISSECTION, ROOFLINE = "runtime-dissection", "llm-viewer"
SLOW_PART = 0.1  # share of a step from which unpacking or launching is worth a sentence


class Reach(BaseModel):
    """How much of the reference's step a policy can touch.

    Attributes:
        share: of the step's time, 0..1.
        limit: speed-up if that part took no time at all (Amdahl); None = without bound.
    """

    model_config = ConfigDict(frozen=True)
    policy: str
    title: str
    kinds: tuple[str, ...]
    share: float
    limit: float | None


class Story(BaseModel):
    """One phase of one lane beside the reference's.

    Attributes:
        seconds, reference_seconds: of one step, measured.
        kinds: measured seconds of the lane's step by kind.
        moved, reference_moved: bytes of weights, cache and activations that a step moves; None where nobody counted.
        predicted: speed-up that the bytes and operations allow, all else unchanged; an estimate.
    """

    model_config = ConfigDict(frozen=True)
    phase: str
    seconds: float
    reference_seconds: float
    kinds: dict[str, float]
    reach: tuple[Reach, ...] = ()
    moved: float | None = None
    reference_moved: float | None = None
    predicted: float | None = None

    @property
    def gained(self) -> float:
        """Measured speed-up of a step."""
        return self.reference_seconds / self.seconds

    def sentences(self) -> list[str]:
        """What there is to say, in plain words."""
        said = [_reach_words(r) for r in self.reach]
        if self.moved is not None and self.reference_moved:
            said.append(
                f"A step moves {_size(self.moved)} where the reference moves {_size(self.reference_moved)} "
                f"({self.moved / self.reference_moved:.2f}x)."
            )
        if self.predicted is not None:
            said.append(
                f"By bytes and operations alone it would be {self.predicted:.2f}x as fast (estimated); it is {self.gained:.2f}x."
            )
        for kind, cause in (("unpacking", "to unpack and round"), ("launching", "in Python and launching")):
            share = self.kinds.get(kind, 0.0) / self.seconds
            if share >= SLOW_PART:
                said.append(f"{100 * share:.0f} % of its step goes {cause}.")
        return said


def reached(card: Card, knobs: Mapping[str, Any]) -> tuple[str, ...]:
    """Kinds of operation that a policy can change."""
    used = [u.resource for u in card.uses(dict(knobs)) if u.mode in ("owns", "edits")]
    found: set[str] = set()
    for resource in used:
        found |= set(next((kinds for start, kinds in REACH if resource.startswith(start)), KINDS))
    return tuple(k for k in KINDS if k in (found or set(KINDS)))


def stories(
    reference: Mapping[str, Any], lane: Mapping[str, Any], steps: Sequence[tuple[Card, Mapping[str, Any]]]
) -> list[Story]:
    """One story a phase.

    Args:
        reference, lane: analyzer id -> its data.
        steps: the lane's policies with their knobs.
    """
    found = []
    theirs, mine = (x.get(DISSECTION, {}).get("phases", {}) for x in (reference, lane))
    for phase in mine:
        if phase not in theirs or theirs[phase]["seconds"] <= 0 or mine[phase]["seconds"] <= 0:
            continue
        base, one = theirs[phase], mine[phase]
        shares = {k: v / base["seconds"] for k, v in base["kinds"].items()}
        reach = [_reach(card, knobs, shares) for card, knobs in steps]
        roofs = [x.get(ROOFLINE, {}).get("phases", {}).get(phase) for x in (reference, lane)]
        moved = predicted = None
        if all(roofs):
            moved = [sum(o["bytes"] for o in r["operations"]) for r in roofs]
            grouped = {"maps": sum(shares.get(k, 0.0) for k in MAPS), "attention": shares.get("attention", 0.0)}
            predicted = predicted_gain(roofs[0]["seconds"], grouped, roofs[1]["seconds"])  # type: ignore[arg-type]
        found.append(
            Story(
                phase=phase,
                seconds=one["seconds"],
                reference_seconds=base["seconds"],
                kinds=one["kinds"],
                reach=tuple(reach),
                moved=moved[1] if moved else None,
                reference_moved=moved[0] if moved else None,
                predicted=predicted,
            )
        )
    return found


def _reach(card: Card, knobs: Mapping[str, Any], shares: Mapping[str, float]) -> Reach:
    kinds = reached(card, knobs)
    share = min(1.0, sum(shares.get(k, 0.0) for k in kinds))
    limit = amdahl(share) if share < 0.999 else None
    return Reach(policy=card.id, title=card.title, kinds=kinds, share=share, limit=limit)


def _reach_words(reach: Reach) -> str:
    if set(reach.kinds) == set(KINDS) or reach.limit is None:
        return f"{reach.title} can change every part of the step."
    what = _listed(KINDS[k] for k in reach.kinds if k != "unpacking")
    return (
        f"{reach.title} can touch {what}: {100 * reach.share:.0f} % of the reference's step. "
        f"If that took no time at all, the step would be {reach.limit:.2f}x as fast (Amdahl)."
    )


def _listed(words: Iterable[str]) -> str:
    all_of = list(words)
    return all_of[0] if len(all_of) == 1 else f"{', '.join(all_of[:-1])} and {all_of[-1]}"


def _size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B"
