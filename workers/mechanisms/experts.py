"""The mixtures of experts of a model: where they are, and a seam at which every routing decision is seen and may be changed.

A router's forward is rerouted for a while, so whoever comes later sees what those before it decided, and nothing of it
stays behind. The library's experts modules know neither their layer nor the model's number of experts a token; both are
found here, once per experiment.

Shapes: T tokens of all rows together; E experts of a layer; K experts a token visits; C hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from studio_state.errors import Unavailable
from workers.mechanisms.expert_linears import ExpertLinears
from workers.session import Session

if TYPE_CHECKING:
    from workers.families.base import Family

SHAPES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Model types whose block is exactly: a router with a row of weights an expert, which gives (logits [T, E], weights [T, K],
indices [T, K]) with the largest weight first; and experts in tensors whose first dimension is E, called with (hidden states
[T, C], indices, weights). Qwen2's shared expert is visited by every token and stands beside them."""
SOURCES = frozenset(f"transformers.models.{t}.modeling_{t}" for t in SHAPES)


@dataclass(frozen=True)
class MoEBlock:
    """One mixture of experts of a bare model.

    Attributes:
        layer: decoder layer that it stands in.
        router, experts: qualified names of the two modules.
        count: number of experts.
        top_k: experts a token visits.
    """

    layer: int
    router: str
    experts: str
    count: int
    top_k: int


@dataclass
class RouterCall:
    """One decision of a router. Who sees it may put other ``indices`` and ``weights`` in the place of these.

    Attributes:
        block: which router.
        count: experts that are there now: fewer than the block's where some were pruned.
        hidden: [T, C] what the experts will read.
        logits: [T, E].
        indices: [T, K] experts that each token visits; ``count`` = it leaves this visit out (see :func:`leaving_out`).
        weights: [T, K] what their outputs are multiplied with.
    """

    block: MoEBlock
    count: int
    hidden: Tensor
    logits: Tensor
    indices: Tensor
    weights: Tensor


Decide = Callable[[RouterCall], None]


def find_blocks(family: Family, model: nn.Module) -> tuple[MoEBlock, ...]:
    """Look through a model that no policy has changed; layers without experts are passed over."""
    found = []
    for layer, name in enumerate(family.parts(model)["layers"]):
        for inner, module in model.get_submodule(name).named_modules(prefix=name):
            router, experts = getattr(module, "gate", None), getattr(module, "experts", None)
            if is_router(router) and isinstance(experts, nn.Module):
                found.append(MoEBlock(layer, f"{inner}.gate", f"{inner}.experts", router.num_experts, router.top_k))
    return tuple(found)


def is_router(module: Any) -> bool:
    """True for a router of the library, of a model type that is known here."""
    return type(module).__module__ in SOURCES and type(module).__name__.endswith("TopKRouter")


def blocks(session: Session) -> tuple[MoEBlock, ...]:
    """The mixtures of experts of the model, found by the first who asks, before any expert is gone; () where there are none."""
    if "moe" not in session.info.traits:
        return ()
    found: tuple[MoEBlock, ...] = session.once(MoEBlock, lambda: find_blocks(session.family, session.model))
    return found


def known_blocks(session: Session) -> tuple[MoEBlock, ...]:
    """The same, for policies that cannot do without.

    Raises:
        Unavailable: the model has none, or of a shape that is not known here.
    """
    found = blocks(session)
    if not found:
        raise Unavailable(
            f"{session.info.name} ({session.info.architecture}) has no mixture of experts that the studio knows; "
            f"those of the model types {', '.join(SHAPES)} are; remove the policies that act on experts"
        )
    return found


@contextmanager
def routed(session: Session, decide: Decide) -> Iterator[None]:
    """Have a function see, and where it likes change, every routing decision for a while, after those who came before it."""
    forwards: dict[str, Callable[..., Any]] = {}
    for block in blocks(session):
        router: Any = session.model.get_submodule(block.router)
        forwards[block.router] = partial(_route, router.forward, decide, block, router.num_experts)
    with session.rerouted(forwards):
        yield


def _route(
    inner: Callable[..., Any], decide: Decide, block: MoEBlock, count: int, hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's forward with somebody looking on."""
    logits, weights, indices = inner(hidden_states)
    call = RouterCall(block, count, hidden_states, logits, indices, weights)
    decide(call)
    return call.logits, call.weights, call.indices


@contextmanager
def leaving_out(session: Session) -> Iterator[None]:
    """Let visits be left out for a while: the experts then work only for those that are not marked with ``count``.

    Which visits these are is known on the device alone, so on a GPU each layer waits for the one before it.
    """
    forwards: dict[str, Callable[..., Any]] = {}
    for block in blocks(session):
        experts: Any = session.model.get_submodule(block.experts)
        forwards[block.experts] = partial(_visit_some, experts.forward, experts.num_experts)
    with session.rerouted(forwards):
        yield


def _visit_some(
    inner: Callable[..., Tensor], count: int, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts' forward, once a visit that is not left out: [T, C]."""
    token, place = (top_k_index < count).nonzero(as_tuple=True)  # [visits]
    each = inner(hidden_states[token], top_k_index[token, place, None], top_k_weights[token, place, None])
    return torch.zeros_like(hidden_states).index_add_(0, token, each)


@torch.no_grad()
def without_experts(session: Session, kept: Mapping[MoEBlock, Tensor]) -> dict[str, nn.Module]:
    """Routers and experts that have only some of the experts, by qualified name; the model's own are not touched.

    A token never visits more experts than are left. Routers that give shares of all experts' probability mass without
    normalising them (OLMoE, Qwen2-MoE) share it among those that are left.

    Args:
        kept: per block the experts that stay [n], ascending.
    """
    new: dict[str, nn.Module] = {}
    for block, stay in kept.items():
        new.update({name: cut(session.model.get_submodule(name), stay) for name in (block.router, block.experts)})
    return new


def cut(module: nn.Module, stay: Tensor) -> nn.Module:
    """A copy of a router or of experts whose tensors have only these entries of their first dimension; it shares the config.

    A router remembers ``originals``: its experts by their numbers in the bare model.
    """
    if isinstance(module, ExpertLinears):
        return module.subset(stay)
    seen: dict[int, Any] = {
        id(p): nn.Parameter(p.detach()[stay.to(p.device)], requires_grad=False) for p in module.parameters(recurse=False)
    }
    config = getattr(module, "config", None)
    seen[id(config)] = config
    new: Any = copy.deepcopy(module, seen)  # it takes what it has seen as already copied
    vars(new).pop("forward", None)  # of somebody who looked on
    new.num_experts = len(stay)
    if is_router(new):
        new.top_k, new.originals = min(new.top_k, len(stay)), stay.tolist()
    return new  # type: ignore[no-any-return]
