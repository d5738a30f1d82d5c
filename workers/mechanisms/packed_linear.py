"""Linear maps that keep their weights packed in 8 bits or fewer and multiply with float activations.

Few rows (decode, scoring) go through kernels that read each packed weight once: our own where they can be
compiled, which round activations to 16 bits by group (:mod:`workers.mechanisms.packed_rows`), else PyTorch's
weight-only CPU kernels, which read bfloat16 activations and return bfloat16, so that the input and output of
each such map are rounded to 8 significant bits. Each output row of these kernels depends on its own input row and weights only, so
batching, chunking and fusing do not change a number. Many rows (prefill), other devices and other shapes
unpack a slice of rows at a time and multiply in the activations' own dtype.

Shapes: m input rows, N output rows, K inputs, g group, B rows of one packed block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.mechanisms import packing
from workers.mechanisms.linear import Lookup, Replacement, bias_of, join_bias, matrix_of
from workers.mechanisms.packed_rows import FINE, Packed, Product, product_of, reads_groups

# Above so many input rows unpacking and a float product are faster (measured with AVX-512).
_INT8_KERNEL_ROWS, _INT4_KERNEL_ROWS = 32, 64
_KERNEL_WIDTH = 16  # the 8-bit kernel reads K in steps of 16 and beyond the end of other widths


class PackedLinear(Replacement):
    """What both formats share: kernel for few rows, slices of unpacked rows otherwise."""

    STEP = packing.ROW_CHUNK
    kernel_rows: int = 0  # up to so many input rows the CPU kernel runs; 0 = there is none for this format or shape

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= self.kernel_rows and x.device.type == "cpu":
            product = self.product()
            if product is None:
                y = self.kernel(rows.bfloat16().contiguous()).to(x.dtype)
            else:
                y = product(rows.float().contiguous()).to(x.dtype)
        else:
            y = torch.cat([F.linear(rows, self.unpacked(a, x.dtype)) for a in range(0, self.out_features, self.STEP)], -1)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def packed_weights(self) -> Packed | None:
        """The weights as the kernels of our own read them; None where they read no such format."""
        return None

    def product(self, input_bits: int = FINE) -> Product | None:
        """Our own product [m, K] -> [m, N] of float32, without bias; None where there is none.

        Args:
            input_bits: what goes in is rounded to, by group: 8 or 16.
        """
        weights = self.packed_weights()
        if weights is None:
            return None
        kept: tuple[int, int, Product | None] | None = self.__dict__.get("_product")
        if kept is None or kept[:2] != (weights.codes.data_ptr(), input_bits):  # a copy, or moved
            kept = (weights.codes.data_ptr(), input_bits, product_of(weights, input_bits))
            self.__dict__["_product"] = kept
        return kept[2]

    def moved(self) -> None:
        """Let go of where the weights were."""
        self.__dict__.pop("_product", None)

    def matrix(self) -> Tensor:
        """The stored weights as float32 [N, K]."""
        return torch.cat([self.unpacked(a, torch.float32) for a in range(0, self.out_features, self.STEP)])

    def lookup(self, dtype: torch.dtype) -> nn.Module:
        """Rows of this very table."""
        return Lookup(self, dtype)

    def kernel(self, x: Tensor) -> Tensor:
        """bfloat16 [m, K] -> bfloat16 [m, N], without bias; by unpacking where no kernel of the library reads the format."""
        return F.linear(x, self.matrix().to(x.dtype))

    @abstractmethod
    def unpacked(self, start: int, dtype: torch.dtype) -> Tensor:
        """Up to ``STEP`` rows of the stored weights from ``start`` on: [n, K]."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Single rows of the stored weights, ids [n]: float32 [n, K]."""


class Int8Linear(PackedLinear):
    """8 bits, one scale a row.

    Args:
        codes: int8 [N, K]; scales: bfloat16 [N]; bias: [N].
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.kernel_rows = _INT8_KERNEL_ROWS if self.in_features % _KERNEL_WIDTH == 0 else 0

    bits = 8.0

    def packed_weights(self) -> Packed:
        """The codes by row."""
        return Packed(8, self.codes, self.scales, self.in_features, self.out_features, self.in_features, self.out_features)

    def ledger(self) -> dict[str, int]:
        """A byte a code, two a row's scale."""
        return {**super().ledger(), "codes": self.codes.numel(), "scales": 2 * self.scales.numel()}

    @classmethod
    def of(cls, source: nn.Module) -> Int8Linear:
        """Round the weights of a linear module."""
        pieces = [packing.round_rows(w) for w in matrix_of(source).detach().split(packing.ROW_CHUNK)]
        return cls(torch.cat([c for c, _ in pieces]), torch.cat([s for _, s in pieces]), bias_of(source))

    def kernel(self, x: Tensor) -> Tensor:
        """bfloat16 [m, K] -> bfloat16 [m, N]."""
        return torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)

    def unpacked(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows [n, K]."""
        stop = start + self.STEP
        return (self.codes[start:stop].float() * self.scales[start:stop, None]).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]."""
        return self.codes[ids].float() * self.scales[ids, None]

    @classmethod
    def joined(cls, parts: Sequence[Int8Linear]) -> Int8Linear:
        """Rows of all parts."""
        return cls(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), join_bias(parts))


class Int4Linear(PackedLinear):
    """4 bits by group, two codes a byte, in the layout that the kernel of this machine reads.

    Rows are padded to a multiple of 64; the padding counts as bytes.

    Args:
        packed: uint8 [N'/64, K/4, 32, 4] (``packing.pack_by_four``, for our kernel) or [N'/B, K, B/2] (``packing.pack``, for that of
            PyTorch), N' padded rows; laid out anew if it comes from a machine that reads another one.
        grid: bfloat16 [K/g, N', 2] (scale, zero); rows: N; bias: [N].
    """

    packed: Tensor
    grid: Tensor

    def __init__(self, packed: Tensor, grid: Tensor, rows: int, bias: Tensor | None):
        k = 2 * packed.numel() // grid.shape[1]
        super().__init__(k, rows, bias)
        self.group = k // grid.shape[0]
        if packed.shape[2:] != _shape_here(self.group):
            packed = arranged(packing.unpack(packed).T, self.group)
        self.register_buffer("packed", packed)
        self.register_buffer("grid", grid)
        has_kernel = self.group in packing.KERNEL_GROUPS and (packed.ndim == 4 or packing.kernel_block() > 0)
        self.kernel_rows = _INT4_KERNEL_ROWS if has_kernel else 0

    bits = 4.0

    def packed_weights(self) -> Packed | None:
        """The codes by blocks of 64 rows and four inputs."""
        if self.packed.ndim != 4:
            return None
        return Packed(4, self.packed, self.grid, self.in_features, self.out_features, self.group, self.grid.shape[1])

    def facts(self) -> dict[str, Any]:
        """How many of the packed rows are rows of the map."""
        return {"rows": self.out_features}

    def ledger(self) -> dict[str, int]:
        """Half a byte a code, four a group; the padding of both is told apart."""
        codes, scales = self.out_features * self.in_features // 2, 4 * self.grid.shape[0] * self.out_features
        padding = self.packed.numel() - codes + 2 * self.grid.numel() - scales
        return {**super().ledger(), "codes": codes, "scales": scales, "padding": padding}

    @classmethod
    def of(cls, source: nn.Module, group: int) -> Int4Linear:
        """Round the weights of a linear module; K must be a multiple of ``group``."""
        weight = matrix_of(source).detach()
        pieces = [packing.round_groups(piece, group) for piece in weight.split(packing.ROW_CHUNK)]
        return cls.stored(torch.cat([c for c, _ in pieces]), torch.cat([g for _, g in pieces], 1), bias_of(source))

    @classmethod
    def stored(cls, codes: Tensor, grid: Tensor, bias: Tensor | None) -> Int4Linear:
        """Codes uint8 [N, K] on a grid [K/g, N, 2], packed."""
        n, k = codes.shape
        fill = packing.padded_rows(n) - n
        pieces = codes.split(packing.ROW_CHUNK)
        pieces = (*pieces[:-1], F.pad(pieces[-1], (0, 0, 0, fill), value=8))
        packed = torch.cat([arranged(piece, k // grid.shape[0]) for piece in pieces])
        scale, zero = F.pad(grid[..., 0], (0, fill), value=1.0), F.pad(grid[..., 1], (0, fill))
        return cls(packed, torch.stack([scale, zero], -1), n, bias)

    def kernel(self, x: Tensor) -> Tensor:
        """bfloat16 [m, K] -> bfloat16 [m, N]."""
        if self.packed.ndim == 4:
            return super().kernel(x)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed.view(-1, self.in_features // 2), self.group, self.grid)
        return y[:, : self.out_features]

    def unpacked(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows [n, K]."""
        block = 2 * self.packed.shape[2]
        stop = min(start + self.STEP, self.out_features)
        codes = packing.unpack(self.packed[start // block : -(-stop // block)])
        weight = packing.dequantise(codes, self.grid[:, start : start + codes.shape[1]])
        return weight[:, : stop - start].T.to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]."""
        half = self.packed.shape[2]
        inside = ids % (2 * half)
        bytes_ = self.packed[ids // (2 * half), :, inside % half].flatten(1)  # [n, K]
        codes = (bytes_ >> (4 * (inside // half))[:, None].to(torch.uint8)) & 15
        return packing.dequantise(codes.T, self.grid[:, ids]).T

    def layout(self) -> Hashable:
        """Same group and block."""
        return (*super().layout(), self.group, self.packed.shape[2])  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[Int4Linear]) -> Int4Linear:
        """Rows of all parts; packed anew only if a part ends inside a block of padding."""
        rows, bias = sum(p.out_features for p in parts), join_bias(parts)
        if all(p.out_features == p.grid.shape[1] for p in parts):
            return cls(torch.cat([p.packed for p in parts]), torch.cat([p.grid for p in parts], 1), rows, bias)
        fill = packing.padded_rows(rows) - rows
        codes = torch.cat([packing.unpack(p.packed)[:, : p.out_features] for p in parts], 1).T
        grid = torch.cat([p.grid[:, : p.out_features] for p in parts], 1)
        return cls(arranged(F.pad(codes, (0, 0, 0, fill)), parts[0].group), F.pad(grid, (0, 0, 0, fill)), rows, bias)


def arranged(codes: Tensor, group: int) -> Tensor:
    """Codes uint8 [N', K] packed in the layout that this machine reads, with so many inputs a scale; N': a multiple of 64."""
    half, *by_four = _shape_here(group)
    return packing.pack_by_four(codes) if by_four else packing.pack(codes, 2 * half)


def _shape_here(group: int) -> tuple[int, ...]:
    """The last dimensions of packed codes in the layout that this machine reads."""
    return (packing.BLOCK // 2, 4) if reads_groups(group) else ((packing.kernel_block() or packing.BLOCK) // 2,)


class BitPlaneLinear(PackedLinear):
    """Any number of bits by group, a plane of bits for each: no CPU kernel reads it, every call unpacks it.

    Args:
        planes: uint8 [b, N, K/8] (:func:`workers.mechanisms.packing.pack_planes`); grid: bfloat16 [K/g, N, 2] (scale, zero); bias: [N].
    """

    planes: Tensor
    grid: Tensor

    def __init__(self, planes: Tensor, grid: Tensor, bias: Tensor | None):
        super().__init__(8 * planes.shape[2], planes.shape[1], bias)
        self.register_buffer("planes", planes)
        self.register_buffer("grid", grid)

    @property
    def bits(self) -> float:
        """One a plane."""
        return float(self.planes.shape[0])

    def ledger(self) -> dict[str, int]:
        """The planes, and four bytes a group."""
        return {**super().ledger(), "codes": self.planes.numel(), "scales": 2 * self.grid.numel()}

    @classmethod
    def stored(cls, codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None) -> BitPlaneLinear:
        """Codes uint8 [N, K] on a grid [K/g, N, 2], packed; K must be a multiple of 8."""
        return cls(packing.pack_planes(codes, bits), grid, bias)

    def unpacked(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows [n, K]."""
        return self._values(self.planes[:, start : start + self.STEP], self.grid[:, start : start + self.STEP]).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]."""
        return self._values(self.planes[:, ids], self.grid[:, ids])

    def _values(self, planes: Tensor, grid: Tensor) -> Tensor:
        return packing.dequantise(packing.unpack_planes(planes).T, grid, len(planes)).T

    def layout(self) -> Hashable:
        """Same bits and group."""
        return (*super().layout(), len(self.planes), self.grid.shape[0])  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[BitPlaneLinear]) -> BitPlaneLinear:
        """Rows of all parts."""
        return cls(torch.cat([p.planes for p in parts], 1), torch.cat([p.grid for p in parts], 1), join_bias(parts))


def stored(codes: Tensor, grid: Tensor, bits: int, bias: Tensor | None) -> PackedLinear:
    """Codes uint8 [N, K] on a grid [K/g, N, 2] in the form that is fastest on a CPU.

    Whoever chooses codes (by rounding, by error feedback, by search) hands them over here.
    """
    if bits == 8 and grid.shape[0] == 1 and not grid[..., 1].any():
        return Int8Linear((codes.to(torch.int16) - 128).clamp(min=-127).to(torch.int8), grid[0, :, 0].contiguous(), bias)
    if bits == 4 and codes.shape[1] // grid.shape[0] in packing.KERNEL_GROUPS:
        return Int4Linear.stored(codes, grid, bias)
    return BitPlaneLinear.stored(codes, grid, bits, bias)
