"""Rounding weights to a grid and packing the codes: pure functions on matrices.

Two formats, both with bfloat16 grids (what the CPU kernels of PyTorch read); the grid is rounded
first and the codes are chosen on the rounded grid, so the error stays within half a step.

* 8 bits by row: ``w ~ code * scale[row]``, codes -127..127, symmetric.
* 4 bits by group of ``g`` inputs: ``w ~ (code - 8) * scale + zero``, codes 0..15. ``zero`` centres
  the grid on the group's range; a group that holds exact zeros (a pruned one) gets ``zero`` = 0, so
  that zeros stay zeros.

Shapes: N output rows, K inputs, g group, B rows of one packed block.
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
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127 * _UP).bfloat16()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight / scales.float()[:, None]).round_().to(torch.int8), scales


def round_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round [N, K] to 4 bits by group: codes uint8 [N, K], grid (scale, zero) bfloat16 [K/g, N, 2].

    |w - w'| <= scale / 2 everywhere; K must be a multiple of ``group``.
    """
    grouped = weight.float().unflatten(1, (-1, group))  # [N, K/g, g]
    low, high = grouped.amin(2), grouped.amax(2)
    middle = (low + high) / 2
    offset = torch.maximum((high - low) / 15, middle.abs() * _COARSE)
    plain = torch.maximum(high, -low) / 7.5 * _UP
    keeps_zeros = (grouped == 0).any(2)
    scale = torch.where(keeps_zeros, plain, offset).bfloat16()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.where(keeps_zeros, 0.0, middle + scale.float() / 2).bfloat16()
    codes = ((grouped - zero.float()[..., None]) / scale.float()[..., None]).round_().add_(8).clamp_(0, 15)
    return codes.flatten(1).to(torch.uint8), torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def pack(codes: Tensor, block: int) -> Tensor:
    """Two codes a byte: uint8 [N, K] -> [N/B, K, B/2]; byte i of a block holds its rows i (low half) and i + B/2 (high half)."""
    low, high = codes.unflatten(0, (-1, block)).chunk(2, 1)  # [N/B, B/2, K] each
    return (low | (high << 4)).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack`, transposed: [N/B, K, B/2] -> codes uint8 [K, N]."""
    bytes_ = packed.permute(1, 0, 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], -1).flatten(1)


def dequantise(codes: Tensor, grid: Tensor) -> Tensor:
    """Codes uint8 [K, N] on their grid [K/g, N, 2]: float32 [K, N]."""
    scale, zero = grid.float().unbind(-1)
    grouped = codes.unflatten(0, (grid.shape[0], -1)).float()
    return grouped.sub_(8).mul_(scale[:, None]).add_(zero[:, None]).flatten(0, 1)


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
