"""Linear maps whose zeros are not stored: tiles of a sparse matrix, each a list of its non-zeros and where they stand.

Tiled-CSL of Flash-LLM (Xia et al. 2023, arXiv:2309.10285, by its released format builder): a matrix is cut into tiles of 128 rows and 64
inputs. Of a tile each number that is not zero is stored with its place in the tile, 2 bytes; a tile's list is filled up to a
multiple of 4 with zeros at free places. A product loads the lists, sets up dense tiles and multiplies those.

Here a list is in the order of the places (row by row), where the original permutes it for the banks of shared memory, and numbers
and places lie in two tensors, not in one word of 32 bits, so that float32 numbers fit too.

Shapes: N output rows, K inputs, T = ceil(N / 128) * ceil(K / 64) tiles, row of tiles by row of tiles, Z numbers stored.
"""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from studio_state.errors import SpecError
from workers.mechanisms.exact_linear import ExactLinear

TILE_ROWS, TILE_WIDTH = 128, 64
TILE = TILE_ROWS * TILE_WIDTH
UNIT = 4  # a tile's list is a multiple of so many numbers long
SLAB = 8  # rows of tiles coded or set up at once, to bound what lives besides the matrix
KERNEL_ROWS = 64  # input rows up to which the GPU kernel is asked


class TiledSparseLinear(ExactLinear):
    """Weights as lists of non-zeros by tile.

    Args:
        values: bfloat16, float16 or float32 [Z]; places: int16 [Z], 64 * row + input within the tile.
        offsets: int32 [T + 1], where each tile's list starts, in units of four numbers.
        stored: numbers that are not there to fill up.
        out_features, in_features: N and K.
        kernel: few rows on a GPU go through the Triton kernel.
        bias: [N].
    """

    values: Tensor
    places: Tensor
    offsets: Tensor

    def __init__(
        self,
        values: Tensor,
        places: Tensor,
        offsets: Tensor,
        stored: int,
        out_features: int,
        in_features: int,
        kernel: bool,
        bias: Tensor | None,
    ):
        super().__init__(in_features, out_features, bias)
        self.stored, self.kernel, self.number_format = stored, kernel, values.dtype
        for name, tensor in {"values": values, "places": places, "offsets": offsets}.items():
            self.register_buffer(name, tensor)
        self.longest = UNIT * int(offsets.diff().max())

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, kernel: bool = False) -> Self:
        """The lists of weights [N, K]; a negative zero is kept as a number."""
        whole = weight.view({2: torch.int16, 4: torch.int32}[weight.element_size()])
        values, places, lengths, stored = [], [], [], 0
        for rows in whole.split(SLAB * TILE_ROWS):
            tiles = _tiles(rows)  # [t, TILE], as integers
            held = tiles != 0
            stored += int(held.sum())
            free = ~held
            held |= free & (free.cumsum(1, dtype=torch.int32) <= (free.sum(1) % UNIT)[:, None])  # TILE is a multiple of UNIT
            values.append(tiles[held].view(weight.dtype))
            places.append(held.nonzero()[:, 1].to(torch.int16))
            lengths.append(held.sum(1) // UNIT)
        offsets = F.pad(torch.cat(lengths).cumsum(0), (1, 0)).to(torch.int32)
        return cls(torch.cat(values), torch.cat(places), offsets, stored, *weight.shape, kernel, bias)

    def decoded(self) -> Tensor:
        """[N, K], every bit as it was; set up a few rows of tiles at a time."""
        out = torch.empty(self.out_features, self.in_features, dtype=self.number_format, device=self.values.device)
        wide, starts = -(-self.in_features // TILE_WIDTH), UNIT * self.offsets.long()
        for a in range(0, self.out_features, SLAB * TILE_ROWS):
            rows = out[a : a + SLAB * TILE_ROWS]
            first = a // TILE_ROWS * wide
            ends = starts[first : first + -(-len(rows) // TILE_ROWS) * wide + 1]
            tile = torch.arange(len(ends) - 1, device=ends.device).repeat_interleave(ends.diff())
            part = slice(int(ends[0]), int(ends[-1]))
            flat = torch.zeros((len(ends) - 1) * TILE, dtype=self.number_format, device=ends.device)
            flat[tile * TILE + self.places[part].long()] = self.values[part]
            tall = flat.view(-1, wide, TILE_ROWS, TILE_WIDTH).transpose(1, 2).flatten(2).flatten(0, 1)
            rows.copy_(tall[: len(rows), : self.in_features])
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]; few rows of the weights' own 16-bit format on a GPU by the kernel, if it is asked for."""
        rows = x.numel() // x.shape[-1]
        if not (self.kernel and x.is_cuda and rows <= KERNEL_ROWS and x.dtype == self.number_format != torch.float32):
            return super().forward(x)
        from workers.mechanisms.tiled_csl_kernel import product  # Triton is there with CUDA builds of PyTorch only

        y = product(x.reshape(-1, self.in_features), self.values, self.places, self.offsets, self.out_features, self.longest)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

    @property
    def bits(self) -> float:
        """Of one weight on average: numbers and places, without what fills up."""
        return 8 * self.stored * (self.values.element_size() + 2) / (self.out_features * self.in_features)

    def ledger(self) -> dict[str, int]:
        """The tiles' starts count as scales."""
        each = self.values.element_size() + 2
        return {
            "codes": self.stored * each,
            "scales": self.table_bytes("offsets"),
            "padding": (len(self.values) - self.stored) * each,
            "bias": self.table_bytes("bias"),
        }

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:  # type: ignore[override]
        """Rows of all parts, in new tiles."""
        whole = super().joined(parts)
        whole.kernel = parts[0].kernel
        return whole


def _tiles(rows: Tensor) -> Tensor:
    """Rows [n, K] as tiles [t, TILE], filled up with zeros at the edges."""
    n, k = rows.shape
    padded = F.pad(rows, (0, -k % TILE_WIDTH, 0, -n % TILE_ROWS))
    return padded.view(-1, TILE_ROWS, padded.shape[1] // TILE_WIDTH, TILE_WIDTH).transpose(1, 2).reshape(-1, TILE)


def break_even(bytes_a_number: int) -> float:
    """Share of zeros above which lists are smaller than the dense matrix, starts and filling aside: 1/2 for two bytes, 1/3 for four."""
    return 2 / (bytes_a_number + 2)


def check_kernel(device: str, dtype: torch.dtype) -> None:
    """Whether the Triton kernel can run.

    Raises:
        SpecError: no CUDA device, no Triton, or a number format of 32 bits.
    """
    from importlib.util import find_spec

    if device == "cuda" and dtype != torch.float32 and find_spec("triton"):
        return
    raise SpecError(
        f"flash-llm: product = triton needs an NVIDIA GPU, the package triton (it comes with PyTorch for CUDA) and 16-bit weights; "
        f"this is {str(dtype).removeprefix('torch.')} on {device}: take product = unpack"
    )
