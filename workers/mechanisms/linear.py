"""What stands in for a linear map of a model, and how its bytes are counted.

Who puts it there is :mod:`workers.mechanisms.weight_policy`. A linear map is the library's ``nn.Linear``, the transposed
one of GPT-2, a convolution seen as a matrix with a row an output channel, or another replacement.

Shapes: N output rows, K inputs.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Storable(nn.Module):
    """A module that an exported model can hold: its constructor makes it again.

    What the constructor takes is looked up under the arguments' own names: a tensor among the buffers, a module (or a
    ``ModuleList``) among the modules inside, a plain value (number, text, truth value, number format, sizes, None) among the
    attributes. An argument named ``like`` is the module of the bare model in whose place it stands. So
    ``__init__(self, codes, scales, bias)`` with buffers of these names needs nothing more. A class that keeps an argument
    otherwise overrides :meth:`facts`; one whose tensors no buffer shows (packed inside a library's object) overrides
    :meth:`tensors` and :meth:`rebuild`.

    Class attributes:
        in_model_dtype: arguments in the number format of the model itself, which follow it when it is loaded in another one.
    """

    in_model_dtype: ClassVar[tuple[str, ...]] = ("bias",)

    def facts(self) -> dict[str, Any]:
        """The constructor's plain arguments.

        Raises:
            TypeError: the module keeps an argument nowhere.
        """
        found = {}
        for name in _arguments(type(self)):
            if name == "like" or name in self._buffers or name in self._modules:
                continue
            if not hasattr(self, name):
                raise TypeError(f"{type(self).__name__} does not keep its argument {name!r}; let it override facts()")
            found[name] = getattr(self, name)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """The constructor's tensors."""
        held = {name: self._buffers.get(name) for name in _arguments(type(self))}
        return {name: t for name, t in held.items() if t is not None}

    def inside(self) -> dict[str, nn.Module]:
        """The constructor's modules, all storable themselves or lists of such."""
        held = {name: self._modules.get(name) for name in _arguments(type(self))}
        return {name: m for name, m in held.items() if m is not None}

    def computed_bytes(self) -> int:
        """Bytes that it holds and no tensor of :meth:`tensors` does: the constructor computes them."""
        return 0

    @classmethod
    def rebuild(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], inside: Mapping[str, nn.Module], like: nn.Module
    ) -> Self:
        """Another one of the same values; what is missing and may be None (a bias) is None.

        Args:
            facts, tensors, inside: as the methods of these names gave them; sizes come as tuples.
            like: what the bare model has in its place.
        """
        takes = _arguments(cls)
        given = {**facts, **tensors, **inside, **({"like": like} if "like" in takes else {})}
        return cls(
            **{**{name: None for name, a in takes.items() if a.default is a.empty and "None" in str(a.annotation)}, **given}
        )


def _arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    """What a class's constructor takes."""
    return inspect.signature(cls).parameters


class Replacement(Storable, ABC):
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

    @property
    def bits(self) -> float:
        """Bits of one weight's code, without scales and padding."""
        return 8.0 * self.matrix().element_size()

    def ledger(self) -> dict[str, int]:
        """Where its bytes go: ``codes``, ``scales``, ``padding``, ``bias``; they add up to :meth:`nbytes`."""
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return {"codes": self.nbytes() - bias, "scales": 0, "padding": 0, "bias": bias}

    def hidden_bytes(self) -> int:
        """Bytes that no tensor of this module shows (weights packed inside a library's object)."""
        return 0

    def figures(self) -> dict[str, tuple[float, float]]:
        """Metric -> what one input row takes here, and what it takes as a product of floats: counted or simulated, not measured."""
        return {}

    @property
    def weight(self) -> Tensor:
        """Nothing, in float32: Mamba's code turns what it gives the output head into the format of the head's weights."""
        return torch.empty(0)

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

    in_model_dtype = ("weight", "bias")

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self._buffers["weight"] = weight  # register_buffer refuses the name of a property

    @property
    def weight(self) -> Tensor:
        """[N, K]."""
        weight = self._buffers["weight"]
        assert weight is not None
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return F.linear(x, self.weight, self.bias)

    @property
    def bits(self) -> float:
        """Those of the number format."""
        return 8.0 * self.weight.element_size()

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


class Lookup(Storable):
    """Reads rows of a packed table, in the place of an embedding that is tied to the output head.

    Args:
        table: a replacement with ``rows(ids [n]) -> [n, K]``.
        dtype: number format of the embeddings.
    """

    in_model_dtype = ("dtype",)

    def __init__(self, table: Any, dtype: torch.dtype):
        super().__init__()
        self.table, self.dtype = table, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> [..., K]."""
        rows: Tensor = self.table.rows(ids.reshape(-1))
        return rows.to(self.dtype).unflatten(0, ids.shape)


class Convolved(Storable):
    """A convolution whose weights a replacement holds; they are unpacked for every call.

    Args:
        inner: the weights as [N, C * h * w].
        like: the convolution whose geometry it has.
    """

    def __init__(self, inner: Replacement, like: nn.Conv2d | Convolved):
        super().__init__()
        self.inner = inner
        self.window, self.stride, self.padding, self.dilation = like.window if isinstance(like, Convolved) else like.kernel_size, like.stride, like.padding, like.dilation  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, H', W']."""
        weight = self.inner.matrix().to(x.dtype).view(self.inner.out_features, -1, *self.window)
        bias = None if self.inner.bias is None else self.inner.bias.to(x.dtype)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)


def matrix_of(module: Any) -> Tensor:
    """Weights [N, K] of a linear module, a convolution or a replacement (as another policy left them)."""
    if isinstance(module, Convolved):
        module = module.inner
    if isinstance(module, Replacement):
        return module.matrix()
    weight: Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def bias_of(module: Any) -> Tensor | None:
    """Its bias [N], detached."""
    bias = getattr(module.inner if isinstance(module, Convolved) else module, "bias", None)
    return None if bias is None else bias.detach()


def zeros_of(module: Any) -> int | None:
    """Weights that a policy masked in it; None where none did."""
    return getattr(module.inner if isinstance(module, Convolved) else module, "zeros", None)


def join_bias(parts: Iterable[Any]) -> Tensor | None:
    """Biases of parts that all have one, or None."""
    biases = [p.bias for p in parts if p.bias is not None]
    return torch.cat(biases) if biases else None


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of all parameters and buffers that can be reached from some modules; whatever overlaps counts once.

    Swapped-out originals cannot be reached, so they do not count. Tensors without storage (``meta``) do not either.
    """
    seen = {id(m): m for root in modules for m in root.modules()}.values()
    tensors = (t for m in seen for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
    return tensor_bytes(tensors) + sum(m.hidden_bytes() for m in seen if isinstance(m, Replacement))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that some tensors span; whatever overlaps counts once."""
    there = (t for t in tensors if t.numel() and not t.is_meta)
    spans = sorted((str(t.device), t.data_ptr(), t.data_ptr() + _extent(t)) for t in there)
    total, device, end = 0, "", 0
    for where, start, stop in spans:
        end = end if where == device else 0
        total += max(0, stop - max(start, end))
        device, end = where, max(stop, end)
    return total


def _extent(t: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()
