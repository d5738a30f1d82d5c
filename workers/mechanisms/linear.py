"""Other modules in the place of a model's linear maps: built once, swapped in and out, bytes counted.

A policy that alters weights says only what stands in for one module (:class:`WeightPolicy`); this
file does the rest. A replacement is cached under (policy with its knobs, module name, the module it
was built from). What stands at that name while earlier policies are attached *is* the module it is
built from, so ``magnitude+rtn`` packs the pruned weights, ``rtn`` alone packs the original ones, and
both are kept side by side. The originals are never edited.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from workers.families.base import Family
    from workers.session import Session


class Replacement(nn.Module, ABC):
    """Base of what stands in for a linear map. All its tensors are buffers.

    Attributes:
        replaces: linear maps of the model that it stands for.
        zeros: weights that are exactly zero, where a policy masked some; else None.
        made_by: the policies that made it, if it was built while loading (no original exists).
    """

    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.replaces, self.zeros = 1, None  # type: int, int | None
        self.made_by: tuple[Any, ...] = ()
        self.register_buffer("bias", bias)

    def nbytes(self) -> int:
        """Bytes of its own storages, scales and paddings included; shared ones once."""
        return held_bytes([self])

    def hidden_bytes(self) -> int:
        """Bytes that no tensor of this module shows (weights packed inside a library's object)."""
        return 0

    @abstractmethod
    def matrix(self) -> Tensor:
        """The weights it multiplies with, as float32 [N, K]."""

    def lookup(self, dtype: torch.dtype) -> nn.Module | None:
        """A module that reads rows of the same stored table (for tied embeddings), or None if it cannot."""
        return None

    def layout(self) -> Hashable:
        """Replacements of equal layout can be fused."""
        return (type(self), self.in_features, None if self.bias is None else self.bias.dtype)

    @classmethod
    def fuse(cls, parts: Sequence[Replacement]) -> Replacement | None:
        """One replacement with the output rows of all parts, giving the same numbers; None if they differ in layout."""
        if len({p.layout() for p in parts}) != 1:
            return None
        whole = cls.joined(parts)
        whole.replaces = sum(p.replaces for p in parts)
        zeros = [p.zeros for p in parts if p.zeros is not None]
        whole.zeros = sum(zeros) if len(zeros) == len(parts) else None
        return whole

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Any]) -> Replacement:
        """Parts of equal layout, concatenated by output rows."""


class DenseLinear(Replacement):
    """A plain linear map with other values.

    Args:
        weight: [N, K].
    """

    weight: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.weight, self.bias)

    def matrix(self) -> Tensor:
        """The weights as float32 [N, K]."""
        return self.weight.float()

    def layout(self) -> Hashable:
        """Same number format and width."""
        return (*super().layout(), self.weight.dtype)  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[DenseLinear]) -> DenseLinear:
        """Rows of all parts."""
        return cls(torch.cat([p.weight for p in parts]), join_bias(parts))


class Lookup(nn.Module):
    """Reads rows of a packed table, in the place of an embedding that is tied to the output head.

    Args:
        table: a replacement with ``rows(ids [n]) -> [n, K]``.
        dtype: number format of the embeddings.
    """

    def __init__(self, table: Any, dtype: torch.dtype):
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., K]."""
        rows: Tensor = self.table.rows(ids.reshape(-1))
        return rows.to(self.dtype).unflatten(0, ids.shape)


class WeightPolicy(Protocol):
    """What this file asks of a policy that alters weights; it must be hashable by its knobs."""

    card: Any  # ClassVar[Card]

    def replacement(self, source: nn.Module, head: bool) -> Replacement | None:
        """What stands in for one linear module (``head``: the output head); None leaves it alone."""
        ...


@dataclass(frozen=True)
class Places:
    """Names of the linear maps of a bare model: inside the layers, the output head, the embedding tied to it."""

    linears: tuple[str, ...]
    head: str | None
    embedding: str | None


def find_places(family: Family, model: nn.Module) -> Places:
    """Look through a model that no policy has changed."""
    parts = family.parts(model)
    head = next(iter(parts.get("head", [])), None)
    embedding = model.get_input_embeddings() if head and hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    tied = isinstance(embedding, nn.Embedding) and embedding.weight is model.get_submodule(str(head)).weight
    name = next((n for n, m in model.named_modules() if m is embedding), None) if tied else None
    return Places(tuple(parts["linears"]), head, name)


def places(session: Session) -> Places:
    """The same, found once per experiment: by the first policy that asks, before anything is swapped."""
    found: Places = session.once(Places, lambda: find_places(session.family, session.model))
    return found


def is_linear(module: nn.Module) -> bool:
    """True for linear maps, the library's or a replacement."""
    return isinstance(module, nn.Linear | Replacement)


def matrix_of(module: nn.Module) -> Tensor:
    """Weights [N, K] of a linear module or of a replacement (as another policy left them)."""
    return module.matrix() if isinstance(module, Replacement) else module.weight  # type: ignore[return-value]


def bias_of(module: nn.Module) -> Tensor | None:
    """Its bias [N], detached."""
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()


def join_bias(parts: Iterable[Any]) -> Tensor | None:
    """Biases of parts that all have one, or None."""
    biases = [p.bias for p in parts if p.bias is not None]
    return torch.cat(biases) if biases else None


@torch.no_grad()
def build(policy: WeightPolicy, source: nn.Module, head: bool) -> Replacement | None:
    """One replacement. The zeros of a masked source are counted again, as they are after the policy."""
    new = policy.replacement(source, head)
    if new is not None and new.zeros is None and getattr(source, "zeros", None) is not None:
        new.zeros = int((new.matrix() == 0).sum())
    return new


def replacements(session: Session, policy: WeightPolicy) -> dict[str, nn.Module]:
    """What a policy puts into the model as it stands now, by qualified name; built on the first call.

    A module that this very policy made while the model was loaded is returned as it is.

    Raises:
        SpecError: a weight that the policy cannot take.
    """
    spots, found = places(session), {}  # type: Places, dict[str, nn.Module]
    names = [*spots.linears, *([spots.head] if spots.head else [])]
    for i, name in enumerate(names):
        source = session.model.get_submodule(name)
        if policy in getattr(source, "made_by", ()):
            found[name] = source
            continue
        key = (policy, name, source)
        if key not in session.built:
            session.check_cancelled()
            session.say(f"{policy.card.title}: {name}", i / len(names))
        new = session.once(key, partial(build, policy, source, name == spots.head))
        if new is not None:
            found[name] = new
    if spots.embedding and spots.head in found and found[spots.head] is not session.model.get_submodule(spots.head):
        lookup = session.once((policy, spots.embedding, found[spots.head]), partial(found[spots.head].lookup, session.dtype))  # type: ignore[arg-type]
        if lookup is not None:
            found[spots.embedding] = lookup
    return found


@contextmanager
def replacing(session: Session, policy: WeightPolicy) -> Iterator[None]:
    """Have a policy's replacements in the model for a while."""
    modules = replacements(session, policy)
    count = sum(isinstance(m, Replacement) for m in modules.values())
    if count:
        session.did(policy.card.id, count)
    with session.swapped(modules):
        yield


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers that can be reached from some modules; whatever overlaps counts once.

    Swapped-out originals cannot be reached, so they do not count. Tensors without storage (``meta``) do not either.
    """
    seen = {id(m): m for root in modules for m in root.modules()}.values()
    tensors = [t for m in seen for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)) if t.numel() and not t.is_meta]
    spans = sorted((str(t.device), t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors)
    total, device, end = 0, "", 0
    for where, start, stop in spans:
        end = end if where == device else 0
        total += max(0, stop - max(start, end))
        device, end = where, max(stop, end)
    return total + sum(m.hidden_bytes() for m in seen if isinstance(m, Replacement))


def _extent(t: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()


def weight_bytes(session: Session) -> int:
    """Bytes of the weights of the lane whose policies are attached now, those of a draft model included."""
    return held_bytes([session.model, *session.companions])


def weight_metrics(session: Session) -> dict[str, float]:
    """``weight_bytes``, ``replaced_modules`` and (where weights are masked) ``zero_weights`` of the attached lane."""
    new = [m for m in session.model.modules() if isinstance(m, Replacement)]
    out = {"weight_bytes": float(weight_bytes(session)), "replaced_modules": float(sum(m.replaces for m in new))}
    masked = [m for m in new if m.zeros is not None]
    if masked:
        out["zero_weights"] = sum(m.zeros or 0 for m in masked) / sum(m.in_features * m.out_features for m in masked)
    return out
