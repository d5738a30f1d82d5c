"""Policies that put other modules in the place of a model's linear maps: built once, swapped in and out.

A policy says only what stands in for one map (:meth:`WeightPolicy.replacement`); this file does the rest. A replacement is
cached under (policy with its knobs, module name, the module it was built from). What stands at that name while earlier
policies are attached *is* the module it is built from, so ``magnitude+rtn`` packs the pruned weights, ``rtn`` alone packs the
original ones, and both are kept side by side. The originals are never edited.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from studio_state.errors import SpecError
from workers.cards import knob
from workers.mechanisms.calibration import Seen, Want, gathered
from workers.mechanisms.expert_linears import ExpertLinears
from workers.mechanisms.linear import Convolved, Replacement, held_bytes, zeros_of
from workers.mechanisms.weight_ledger import Ledger, weight_ledger
from workers.mechanisms.weight_places import Places, places
from workers.methods import Policy
from workers.session import Session

QUANTIZES: dict[str, Any] = {
    "stage": "quantize",
    "families": ("llm", "vlm", "diffusion", "vit"),
    "owns": ("weights.format",),
    "effects": {"weight_bytes": "down"},
    "neutral": None,
    "alters_weights": True,
}  # what the cards of policies that store fewer bits have in common
QUANTIZES_INPUTS_TOO: dict[str, Any] = QUANTIZES | {"owns": ("weights.format", "activations.format")}
WHICH = "Which maps, and what it is calibrated on"  # heading of the knobs that all weight policies have


class Spot(NamedTuple):
    """Where a replacement is to stand.

    Attributes:
        name: qualified name of the map.
        head: it is the output head.
        seen: statistics of its inputs, for policies that want some; None where no calibration input came by.
        plan: what the policy decided for the whole model (:meth:`WeightPolicy.plan`).
    """

    name: str
    head: bool = False
    seen: Seen | None = None
    plan: Any = None


class WeightPolicy(Policy):
    """Base of policies that alter weights.

    Class attributes:
        wants: statistics of the maps' inputs that it needs; none = it looks at the weights alone.
        convolutions: it can also replace a convolution, seen as a matrix with a row an output channel.
    """

    wants: ClassVar[frozenset[Want] | None] = None
    convolutions: ClassVar[bool] = False

    modules: str = knob(
        "",
        max_length=400,
        group=WHICH,
        help="only linear maps whose name matches one of these patterns, e.g. *.mlp.*, *.0.self_attn.*; empty = all",
    )

    @abstractmethod
    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """What stands in for one linear map; None leaves it alone.

        Args:
            source: the map as earlier policies left it (:func:`workers.mechanisms.linear.matrix_of`).
        """

    def plan(self, session: Session, names: Sequence[str]) -> Any:
        """What it decides for the whole model before it builds anything (bits of each map); found once per experiment."""
        return None

    @property
    def samples_wanted(self) -> int:
        """Calibration inputs to run."""
        return 0

    def check(self, session: Session) -> None:
        """Whether it can run here at these knobs; told before anything is built.

        Raises:
            SpecError: it cannot.
        """

    def prepare(self, session: Session) -> None:
        """Build all replacements.

        Raises:
            SpecError: see :meth:`check`.
        """
        self.check(session)
        replacements(session, self)

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Put them in.

        Raises:
            SpecError: see :meth:`check`.
        """
        self.check(session)
        return replacing(session, self)

    def head_factor(self, bits: int) -> float:
        """As the knob ``head`` says, where there is one: kept as it is, in 8 bits, or like the rest."""
        head = getattr(self, "head", "same")
        return 1.0 if head in (False, "keep") else 8 / bits if head == "int8" else self.weight_factor(bits)

    def takes(self, name: str) -> bool:
        """Whether the knob ``modules`` lets it touch this map."""
        patterns = [p.strip() for p in self.modules.split(",") if p.strip()]
        return not patterns or any(fnmatchcase(name, p) for p in patterns)


class CalibratedPolicy(WeightPolicy):
    """Base of those that look at what goes into the maps."""

    wants: ClassVar[frozenset[Want] | None] = frozenset()

    samples: int = knob(
        8,
        ge=1,
        le=128,
        group=WHICH,
        help="calibration inputs: texts of 512 tokens, images or drawings; more = steadier statistics, slower to build",
    )

    @property
    def samples_wanted(self) -> int:
        """Those of the knob."""
        return self.samples


@torch.no_grad()
def build(policy: WeightPolicy, source: nn.Module, spot: Spot) -> nn.Module | None:
    """One replacement. The zeros of a masked source are counted again, as they are after the policy."""
    new = policy.replacement(source, spot)
    if new is None:
        return None
    if new.zeros is None and zeros_of(source) is not None:
        new.zeros = int((new.matrix() == 0).sum())
    return Convolved(new, source) if isinstance(source, nn.Conv2d | Convolved) else new


def targets(session: Session, policy: WeightPolicy) -> list[str]:
    """Names of the maps that a policy may touch, in the model's order, the head last; experts' maps under their own names.

    Raises:
        SpecError: the patterns of ``modules`` match none.
    """
    spots = places(session)
    names = [*spots.linears, *(spots.convolutions if policy.convolutions else ())]
    for name in spots.experts:
        inside = ExpertLinears.of(session.model.get_submodule(name))
        names += [f"{name}.{one}" for one in inside.names()]
    names += [spots.head] if spots.head else []
    found = [n for n in names if policy.takes(n)]
    if names and not found:
        raise SpecError(
            f"{policy.card.id}: modules = {policy.modules!r} matches no linear map of {session.info.name}; "
            f"they have names such as {names[0]} and {names[len(names) // 2]}"
        )
    return found


def replacements(session: Session, policy: WeightPolicy) -> dict[str, nn.Module]:
    """What a policy puts into the model as it stands now, by qualified name; built on the first call.

    A module that this very policy made while the model was loaded is returned as it is.

    Raises:
        SpecError: a weight that the policy cannot take.
    """
    spots, names = places(session), targets(session, policy)
    opened = {n: _opened(session, n) for n in spots.experts}
    found: dict[str, nn.Module] = {}
    with session.swapped(opened):  # so that experts' maps have places of their own
        sources = {n: session.model.get_submodule(n) for n in names}
        ready = [n for n in names if policy in getattr(sources[n], "made_by", ())]
        found.update({n: sources[n] for n in ready})
        missing = [n for n in names if n not in found and (policy, n, sources[n]) not in session.built]
        if missing:
            key = (policy, "plan", *(id(m) for m in sources.values()))
            plan = session.once(key, partial(policy.plan, session, names))
            for done, (name, seen) in enumerate(_with_statistics(session, policy, missing)):
                session.check_cancelled()
                session.say(f"{policy.card.title}: {name}", done / len(missing))
                spot = Spot(name, name == spots.head, seen, plan)
                session.once((policy, name, sources[name]), partial(build, policy, sources[name], spot))
        for name in names:
            new = found.get(name) or session.built[policy, name, sources[name]]
            if new is not None:
                found[name] = new
    for name, experts in opened.items():
        mine = {n.removeprefix(f"{name}."): found.pop(n) for n in names if n.startswith(f"{name}.") and n in found}
        if mine:
            found[name] = session.once((policy, name, experts, *map(id, mine.values())), partial(experts.with_maps, mine))
    return _with_embedding(session, policy, spots, found)


def _opened(session: Session, name: str) -> ExpertLinears:
    module = session.model.get_submodule(name)
    opened: ExpertLinears = session.once((ExpertLinears, module), partial(ExpertLinears.of, module))
    return opened


def _with_statistics(session: Session, policy: WeightPolicy, names: list[str]) -> Iterator[tuple[str, Seen | None]]:
    """Each map with what is known of its inputs."""
    if policy.wants is None:
        yield from ((n, None) for n in names)
        return
    for group, seen in gathered(session, names, policy.wants, policy.samples_wanted):
        yield from ((n, seen.get(n)) for n in group)


def _with_embedding(session: Session, policy: WeightPolicy, spots: Places, found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """An embedding that is tied to a replaced head reads the head's table, where that can be read by rows."""
    new = found.get(spots.head or "")
    if spots.embedding and isinstance(new, Replacement) and new is not session.model.get_submodule(str(spots.head)):
        lookup = session.once((policy, spots.embedding, new), partial(new.lookup, session.dtype))
        if lookup is not None:
            found[spots.embedding] = lookup
    return found


@contextmanager
def replacing(session: Session, policy: WeightPolicy) -> Iterator[None]:
    """Have a policy's replacements in the model for a while."""
    modules = replacements(session, policy)
    count = sum(bool(m.replaces) for m in _all_replacements(modules.values()))
    if count:
        session.did(policy.card.id, count)
    with session.swapped(modules):
        yield


def _all_replacements(modules: Iterable[nn.Module]) -> list[Replacement]:
    """Those among some modules and inside them, each once."""
    seen = {id(m): m for root in modules for m in root.modules() if isinstance(m, Replacement)}
    return list(seen.values())


def weight_bytes(session: Session) -> int:
    """Bytes of the weights of the lane whose policies are attached now, those of a draft model included."""
    return held_bytes([session.model, *session.companions])


def ledger(session: Session) -> Ledger | None:
    """Where these bytes go; None where nothing is replaced."""
    return weight_ledger([session.model, *session.companions])


def weight_metrics(session: Session) -> dict[str, float]:
    """``weight_bytes`` and ``replaced_modules`` of the attached lane; where something is replaced the ledger of its bytes and
    ``mean_bits``, where weights are masked ``zero_weights``; what replacements count or simulate of themselves."""
    new = _all_replacements([session.model])
    out = {"weight_bytes": float(weight_bytes(session)), "replaced_modules": float(sum(m.replaces for m in new))}
    books = ledger(session)
    if books:
        out |= {"theoretical_weight_bytes": books.theoretical, "scale_bytes": books.scales, "padding_bytes": books.padding}
    sizes = [(m.bits, m.in_features * m.out_features) for m in new if m.replaces]
    if sizes:
        out["mean_bits"] = sum(bits * size for bits, size in sizes) / sum(size for _, size in sizes)
    masked = [m for m in new if m.zeros is not None]
    if masked:
        out["zero_weights"] = sum(m.zeros or 0 for m in masked) / sum(m.in_features * m.out_features for m in masked)
    figures = [m.figures() for m in new]
    for name in {n: None for one in figures for n in one}:
        pairs = [one[name] for one in figures if name in one]
        out[name] = sum(here for here, _ in pairs) / sum(plain for _, plain in pairs)
    return out
