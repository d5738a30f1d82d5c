"""Linear maps that treat some of their inputs as zero, chosen anew for every token, and the base of policies that do so.

What stands in the model already (the library's map, a pruned or packed one) is wrapped and keeps its bytes. One row at a time
(decoding) on a CPU in float32, the products of the chosen inputs alone are taken: the weights are held by columns, and only
those of chosen inputs are read. Elsewhere (several rows, packed weights, another number format or device) the input is masked
and multiplied in dense form, which saves nothing but shows what the sparsity does to the output.

Shapes: B batch, T tokens, N output rows, K inputs.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.cards import knob
from workers.mechanisms.attention import Forward, active_forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.linear import DenseLinear, Replacement, bias_of, matrix_of
from workers.mechanisms.scaled_input import TransformedInput
from workers.mechanisms.weight_policy import Spot, WeightPolicy, replacements, replacing
from workers.session import Session

SKIPPED = "skipped_inputs"
GATHER_SHARE = 0.65  # above this share of chosen inputs a dense product is as fast (measured with AVX-512, one row)
PIECE = 256  # output columns that a thread is given at least


class Tally:
    """Counts what is left out in the running item, and knows which tokens are left whole.

    Args:
        whole: first tokens of a prompt whose inputs all stay.
    """

    def __init__(self, session: Session, whole: int):
        self.session, self.whole = session, whole
        self.taken: float | Tensor = 0.0
        self.needed: float | Tensor = 0.0

    def add(self, taken: float | Tensor, needed: float | Tensor) -> None:
        """Multiply-adds of one call; tensors are read only when the result is told."""
        if SKIPPED not in self.session.counts:  # a new run
            self.session.counts[SKIPPED], self.taken, self.needed = 0.0, 0.0, 0.0
        self.taken, self.needed = self.taken + taken, self.needed + needed

    def tell(self, cache: StudioCache, forward: Forward) -> None:
        """Note the share that was left out."""
        needed = float(self.needed)
        if needed:
            self.session.counts[SKIPPED] = 1 - float(self.taken) / needed

    def standing(self, x: Tensor, layer: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Of the tokens [B, T, K] of a prompt: which are left whole and which are real, [B, T, 1] each; None = no token, all."""
        forward = active_forward()
        if forward is None or layer is None or forward.phase != "prefill":
            return None, None
        positions = forward.positions_at(layer)
        if x.dim() != 3 or x.shape[:2] != positions.shape:  # an expert's tokens, or patches of an image
            return None, None
        real = positions >= 0
        return (real & (positions < self.whole))[..., None], real[..., None] if forward.padded else None


class SparseInput(TransformedInput):
    """``y = inner(x with some inputs at zero)``.

    Args:
        inner: what is wrapped; counted as part of this one.
        keep: share of the inputs that a token is to keep.

    Attributes:
        layer: of the language model, if it is inside one; tally: where it counts. Both are set while the policy is attached.
        gathers: one row at a time reads the weights of the chosen inputs only.
    """

    def __init__(self, inner: Replacement, keep: float):
        zeros = inner.zeros
        gathers = keep <= GATHER_SHARE and is_plain(inner)
        super().__init__(by_columns(inner) if gathers else inner)
        self.keep, self.gathers, self.zeros = keep, gathers, zeros
        self.layer: int | None = None
        self.tally: Tally | None = None

    @abstractmethod
    def chosen(self, x: Tensor) -> Tensor:
        """Which inputs count: bool [..., K] for x [..., K]."""

    @abstractmethod
    def chosen_of_one(self, x: Tensor) -> Tensor:
        """The same for a single row [K], as indices [k]."""

    @abstractmethod
    def like(self, inner: Replacement) -> Self:
        """Another one that chooses in the same way."""

    def around(self, inner: Replacement) -> Self:
        """Another one that chooses in the same way, and counts in the same place."""
        new = self.like(inner)
        new.layer, new.tally = self.layer, self.tally
        return new

    def transform(self, x: Tensor) -> Tensor:
        """x with the inputs that are left out at zero."""
        return x.masked_fill(~self.chosen(x), 0)

    def back(self, weight: Tensor) -> Tensor:
        """The weights are what they were."""
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        whole, real = (None, None) if self.tally is None else self.tally.standing(x, self.layer)
        if self.gathers and whole is None and x.numel() == self.in_features:
            index = self.chosen_of_one(x.reshape(-1))
            if 0 < len(index) <= GATHER_SHARE * self.in_features:
                self._count(float(len(index)), 1.0)
                return self._gathered(x.reshape(-1), index).view(*x.shape[:-1], -1)
        mask = self.chosen(x)
        if whole is not None:
            mask = mask | whole
        if real is None:
            self._count(mask.sum(), x.numel() // self.in_features)
        else:
            self._count((mask & real).sum(), real.sum())
        y: Tensor = self.inner(x.masked_fill(~mask, 0))
        return y

    def _count(self, taken: float | Tensor, rows: float | Tensor) -> None:
        """Inputs that were taken, of so many rows."""
        if self.tally is not None:
            self.tally.add(taken * self.out_features, rows * self.in_features * self.out_features)

    def _gathered(self, x: Tensor, index: Tensor) -> Tensor:
        """The products of some inputs [k] of a row [K] with their columns of the weights, summed: [N].

        A bag of embeddings is just that: rows of a table, each times a number, summed in one pass. Each thread sums a piece.
        """
        pieces, many = pieces_of(self.out_features, torch.get_num_threads()), len(index)
        table = self.inner.weight.T.view(-1, self.out_features // pieces)  # [K * pieces, N / pieces]
        taken, starts = x[index], torch.arange(0, many * pieces, many)
        if pieces > 1:
            index, taken = (index * pieces + torch.arange(pieces)[:, None]).view(-1), taken.repeat(pieces)
        y = F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=taken).view(-1)
        return y if self.bias is None else y + self.bias


def is_plain(inner: Replacement) -> bool:
    """A dense map in the one number format and on the device for which bags are fast."""
    return type(inner) is DenseLinear and inner.weight.dtype == torch.float32 and inner.weight.device.type == "cpu"


def by_columns(inner: Any) -> DenseLinear:
    """The same dense map with the weights of an input next to each other; as many bytes."""
    return DenseLinear(inner.weight.T.contiguous().T, inner.bias)


@cache
def pieces_of(rows: int, threads: int) -> int:
    """Equal pieces of so many outputs, at most one a thread."""
    return next((p for p in range(threads, 1, -1) if rows % p == 0 and rows // p >= PIECE), 1)


def wrapped(source: nn.Module) -> Replacement:
    """What stands in the model, to be put inside another replacement: its tensors are shared, and it is not changed itself."""
    if isinstance(source, Replacement):
        return copy.copy(source)
    return DenseLinear(matrix_of(source).detach(), bias_of(source))


class SparseInputPolicy(WeightPolicy):
    """Base of policies that wrap linear maps inside the layers in a :class:`SparseInput`. The output head stays.

    The weights are not altered, so an exported model cannot hold this: it says what a run leaves out.
    """

    keep: float = knob(
        0.5, ge=0.05, le=1.0, help="share of its inputs that each linear map multiplies, for each token; lower = faster, worse"
    )
    whole: int = knob(
        4,
        ge=0,
        le=1024,
        help="first tokens of a prompt whose inputs all stay: attention leans on them; more = better, little slower",
    )

    @abstractmethod
    def sparse(self, inner: Replacement, spot: Spot) -> SparseInput | None:
        """The wrapped map; None = it stays as it is."""

    def replacement(self, source: nn.Module, spot: Spot) -> Replacement | None:
        """The map behind its mask."""
        return None if spot.head or self.keep == 1 else self.sparse(wrapped(source), spot)

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Put the masked maps in, and count what they leave out."""
        return self._acting(session)

    @contextmanager
    def _acting(self, session: Session) -> Iterator[None]:
        tally: Tally = session.once((self, Tally), lambda: Tally(session, self.whole))
        layers = session.family.parts(session.model).get("layers", [])
        for name, module in replacements(session, self).items():
            layer = next((i for i, n in enumerate(layers) if name.startswith(f"{n}.")), None)
            for one in module.modules():
                if isinstance(one, SparseInput):
                    one.layer, one.tally = layer, tally
        told = session.hooked(session.after_prefill, tally.tell), session.hooked(session.after_step, tally.tell)
        with replacing(session, self), told[0], told[1]:
            yield

    def why_idle(self, session: Session) -> str:
        """Why every input was multiplied."""
        if self.keep == 1:
            return f"{self.card.title}: keep = {self.keep} leaves no input out; lower it"
        return f"{self.card.title} found no linear map to act on; those of a model that was packed and exported cannot be wrapped"
