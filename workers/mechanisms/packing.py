"""Rounding weights to a grid and packing the codes: pure functions on matrices.

Two formats, both with bfloat16 grids (what the CPU kernels of PyTorch read); the grid is rounded
first and the codes are chosen on the rounded grid, so the error stays within half a step.

* 8 bits by row: ``w ~ code * scale[row]``, codes -127..127, symmetric.
* b bits by group of ``g`` inputs: ``w ~ (code - 2^(b-1)) * scale + zero``, codes 0..2^b - 1. ``zero``
  centres the grid on the group's range; a group that holds exact zeros (a pruned one) gets ``zero`` = 0,
  so that zeros stay zeros.

Shapes: N output rows, K inputs, g group, b bits, B rows of one packed block.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64  # packed rows are padded to a multiple of it; every block size of the kernels divides it
ROW_CHUNK = 4096  # rows rounded or unpacked at once, to bound what lives besides the packed matrix
KERNEL_GROUPS = (32, 64, 128, 256)
_UP = 1 + 2.0**-8  # makes a number at least itself after rounding to bfloat16
_COARSE = 2.0**-7  # steps are not finer than this share of the group's centre, or its bfloat16 error would not fit


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [N, K] to 8 bits by row: codes int8 [N, K], scales bfloat16 [N]. |w - w'| <= scale / 2."""
    scales = row_scales(weight)
    return (weight.float() / scales.float()[:, None]).round_().to(torch.int8), scales


def round_groups(weight: Tensor, group: int, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Round [N, K] by group: codes uint8 [N, K], grid (scale, zero) bfloat16 [K/g, N, 2].

    |w - w'| <= scale / 2 everywhere; K must be a multiple of ``group``.
    """
    grid = fit_groups(weight, group, bits)
    return encode(weight, grid, bits), grid


def fit_groups(weight: Tensor, group: int, bits: int, shrink: float | Tensor = 1.0) -> Tensor:
    """The grid (scale, zero) bfloat16 [K/g, N, 2] that spans each group of [N, K].

    Args:
        shrink: share of each group's range that the grid spans; below 1 the outermost weights are clipped. A number, or [N, K/g].
    """
    levels = 2**bits - 1
    grouped = weight.float().unflatten(1, (-1, group))  # [N, K/g, g]
    low, high = grouped.amin(2) * shrink, grouped.amax(2) * shrink
    middle = (low + high) / 2
    offset = torch.maximum((high - low) / levels, middle.abs() * _COARSE)
    plain = torch.maximum(high, -low) / (levels / 2) * _UP
    keeps_zeros = (grouped == 0).any(2)
    return as_grid(torch.where(keeps_zeros, plain, offset), torch.where(keeps_zeros, torch.nan, middle))


def fit_rows(weight: Tensor) -> Tensor:
    """The 8-bit grid of :func:`round_rows` as one of groups: [1, N, 2] with ``zero`` = 0; codes 1..255 stand for -127..127."""
    return torch.stack([row_scales(weight), torch.zeros(len(weight), dtype=torch.bfloat16, device=weight.device)], -1)[None]


def row_scales(weight: Tensor) -> Tensor:
    """One symmetric scale a row of [N, K] for 8 bits: bfloat16 [N]."""
    scales = (weight.float().abs().amax(1) / 127 * _UP).bfloat16()
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def as_grid(step: Tensor, middle: Tensor) -> Tensor:
    """The stored form of grids with these steps [N, K/g] around these middles; a middle that is NaN makes ``zero`` = 0."""
    scale = step.bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.where(middle.isnan(), 0.0, middle + scale.float() / 2).bfloat16()
    return torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def encode(weight: Tensor, grid: Tensor, bits: int) -> Tensor:
    """The nearest codes uint8 [N, K] of [N, K] on a grid [K/g, N, 2]."""
    scale, zero = grid.float().transpose(0, 1).unbind(-1)  # [N, K/g] each
    grouped = weight.float().unflatten(1, (grid.shape[0], -1))
    codes = ((grouped - zero[..., None]) / scale[..., None]).round_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    return codes.flatten(1).to(torch.uint8)


def pack(codes: Tensor, block: int) -> Tensor:
    """Two codes a byte: uint8 [N, K] -> [N/B, K, B/2]; byte i of a block holds its rows i (low half) and i + B/2 (high half)."""
    low, high = codes.unflatten(0, (-1, block)).chunk(2, 1)  # [N/B, B/2, K] each
    return (low | (high << 4)).transpose(1, 2).contiguous()


def pack_by_four(codes: Tensor) -> Tensor:
    """Two codes a byte, with the codes of four inputs side by side: uint8 [N, K] -> [N/64, K/4, 32, 4].

    Byte [i, c] of a block holds input c of its rows i (low half) and i + 32 (high half).
    """
    low, high = codes.unflatten(0, (-1, BLOCK)).chunk(2, 1)  # [N/64, 32, K] each
    return (low | (high << 4)).unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack` and :func:`pack_by_four`, transposed: [N/B, K, B/2] or [N/B, K/4, B/2, 4] -> codes uint8 [K, N]."""
    bytes_ = packed.permute(1, 0, 2) if packed.ndim == 3 else packed.permute(1, 3, 0, 2).flatten(0, 1)
    return torch.cat([bytes_ & 15, bytes_ >> 4], -1).flatten(1)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """The bits of codes uint8 [N, K], plane by plane: uint8 [b, N, K/8]; bit j of a byte is input 8 i + j. K: a multiple of 8."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [((codes >> i) & 1).unflatten(1, (-1, 8)) << places for i in range(bits)]
    return torch.stack([p.sum(-1, dtype=torch.uint8) for p in planes])


def unpack_planes(planes: Tensor) -> Tensor:
    """Inverse of :func:`pack_planes`: [b, ..., K/8] -> codes uint8 [..., K]."""
    spread = _spread(planes.device)
    words = spread[planes[0].int()]  # eight codes in one
    for i, plane in enumerate(planes[1:], 1):
        words |= spread[plane.int()] << i
    return words.view(torch.uint8)


@cache
def _spread(device: torch.device) -> Tensor:
    """Every byte with its eight bits as the lowest bits of eight bytes: int64 [256]."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return bits.to(torch.uint8).contiguous().view(torch.int64).flatten().to(device)


def dequantise(codes: Tensor, grid: Tensor, bits: int = 4) -> Tensor:
    """Codes uint8 [K, N] on their grid [K/g, N, 2]: float32 [K, N]."""
    scale, zero = grid.float().unbind(-1)
    grouped = codes.unflatten(0, (grid.shape[0], -1)).float()
    return grouped.sub_(2 ** (bits - 1)).mul_(scale[:, None]).add_(zero[:, None]).flatten(0, 1)


@cache
def kernel_block() -> int:
    """Rows of one block in the layout that this CPU's 4-bit kernel reads; 0 if it reads another layout than ours.

    PyTorch's layout depends on the instruction set, so a probe packed by its own operator is compared with ours.
    """
    probe = torch.arange(2 * BLOCK * 32).reshape(2 * BLOCK, 32) * 7919 % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe.int(), 1).flatten()
    return next((b for b in (64, 32, 16) if torch.equal(pack(probe.to(torch.uint8), b).flatten(), theirs)), 0)


def padded_rows(rows: int) -> int:
    """The next multiple of :data:`BLOCK`."""
    return -(-rows // BLOCK) * BLOCK
