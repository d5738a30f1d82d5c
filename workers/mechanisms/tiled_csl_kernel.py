"""Flash-LLM's product on a GPU, in Triton: load as sparse, compute as dense. Import it only where Triton is installed.

A program owns 128 output rows and a share of the tiles along K. Of each tile it loads the list, sets up the dense tile on chip and
multiplies it. Shared memory cannot be written at places of one's choice in Triton, so the tile is set up from the other side: a
histogram of the places (0 or 1, as a place occurs once) says which numbers of the tile are stored, its running sum says where in the
list, which is in the order of the places.

The shares of K are summed at the end in a fixed order, so results do not vary from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.mechanisms.tiled_csl import TILE_ROWS, TILE_WIDTH, UNIT

SPLITS_WANTED = 256  # programs that keep a large GPU busy
BLOCK = 16  # the fewest input rows of a tensor core's product


@triton.jit
def tiles_kernel(
    x, values, places, offsets, out, m, n, k, wide, share,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [m, k], lists of W [n, k] -> out float32 [splits, m, n]; ``wide`` tiles along K, ``share`` of them a program."""
    row, split = tl.program_id(0), tl.program_id(1)
    at_m = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at_n = row * ROWS + tl.arange(0, ROWS)
    items = tl.arange(0, LONGEST)
    total = tl.zeros((BLOCK, ROWS), tl.float32)
    for tile in range(split * share, tl.minimum(split * share + share, wide)):
        start = UNIT * tl.load(offsets + row * wide + tile)
        stop = UNIT * tl.load(offsets + row * wide + tile + 1)
        held = items < stop - start
        where = tl.load(places + start + items, mask=held, other=0).to(tl.int32)
        there = tl.histogram(where, ROWS * WIDTH, mask=held)
        rank = tl.cumsum(there, 0) - there
        flat = tl.load(values + start + rank, mask=there > 0, other=0.0)
        weight = tl.reshape(flat, (ROWS, WIDTH))
        at_k = tile * WIDTH + tl.arange(0, WIDTH)
        part = tl.load(x + at_m[:, None] * k + at_k[None, :], mask=(at_m < m)[:, None] & (at_k < k)[None, :], other=0.0)
        total = tl.dot(part, tl.trans(weight), total)
    place = (split * m + at_m)[:, None] * n + at_n[None, :]
    tl.store(out + place, total, mask=(at_m < m)[:, None] & (at_n < n)[None, :])


def product(x: Tensor, values: Tensor, places: Tensor, offsets: Tensor, n: int, longest: int) -> Tensor:
    """x [m, K] in the values' 16-bit format times the transposed matrix [N, K] of these lists: float32 [m, N].

    Args:
        longest: numbers in the longest list.
    """
    m, k = x.shape
    tall, wide = triton.cdiv(n, TILE_ROWS), triton.cdiv(k, TILE_WIDTH)
    share = triton.cdiv(wide, min(wide, triton.cdiv(SPLITS_WANTED, tall)))
    splits = triton.cdiv(wide, share)
    out = torch.empty(splits, m, n, dtype=torch.float32, device=x.device)
    tiles_kernel[(tall, splits, triton.cdiv(m, BLOCK))](
        x.contiguous(), values, places, offsets, out, m, n, k, wide, share,
        ROWS=TILE_ROWS, WIDTH=TILE_WIDTH, UNIT=UNIT, LONGEST=triton.next_power_of_2(max(longest, 2)), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out.sum(0)
