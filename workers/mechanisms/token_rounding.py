"""Activations rounded token by token to a symmetric grid, and exact integer products of them with 8-bit weights.

Every input row has a scale of its own, found at every call, so batching, chunking and fusing do not change a number.

Shapes: m input rows, N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workers.mechanisms import packing
from workers.mechanisms.linear import Lookup, Replacement, join_bias

_TINY = torch.finfo(torch.float32).tiny
_CUDA_ROWS = 32  # the integer product of CUDA takes more than 16 rows, and widths that 8 divides


def by_token(x: Tensor, bits: int = 8, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and step of each row: float32 whole numbers [..., K] within +-(2^(bits-1) - 1), and float32 [..., 1].

    Args:
        clip: share of a row's largest absolute value that the grid spans; what lies beyond is cut.
    """
    top = 2 ** (bits - 1) - 1
    x = x.float()
    step = (x.abs().amax(-1, keepdim=True) * (clip / top)).clamp_min_(_TINY)
    return (x / step).round_().clamp_(-top, top), step


def row_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [N, K] as int8 codes -127..127 and a float32 scale a row [N], its largest absolute value over 127."""
    scales = weight.float().abs().amax(1) / 127
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    return (weight.float() / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales


def int_product(x: Tensor, w: Tensor) -> Tensor:
    """int8 [m, K] times int8 [N, K] transposed: int32 [m, N], exact.

    Integer instructions where sums cannot overflow (CPUs with VNNI; CUDA at widths that 8 divides); elsewhere in
    float64, a slice of rows at a time, which is as exact and slow.
    """
    if x.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch._int_mm(x, w.T)
    if x.device.type == "cuda" and not x.shape[1] % 8 and not w.shape[0] % 8:
        return torch._int_mm(F.pad(x, (0, 0, 0, max(0, _CUDA_ROWS - len(x)))), w.T)[: len(x)]
    return torch.cat([(x.double() @ rows.double().T).to(torch.int32) for rows in w.split(packing.ROW_CHUNK)], 1)


class Int8Product(Replacement):
    """8-bit weights with a scale a row, 8-bit activations with a scale a token, multiplied as integers.

    Args:
        codes: int8 [N, K]; scales: float32 [N]; bias: [N].
    """

    codes: Tensor
    scales: Tensor
    bits = 8.0

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None):
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        y = self.product(x.reshape(-1, self.in_features))
        y = y if self.bias is None else y.add_(self.bias)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """Rows [m, K] -> float32 [m, N], without bias."""
        codes, step = by_token(x)
        return int_product(codes.to(torch.int8), self.codes).float().mul_(step).mul_(self.scales)

    def matrix(self) -> Tensor:
        """The stored weights as float32 [N, K]."""
        return self.codes.float() * self.scales[:, None]

    def rows(self, ids: Tensor) -> Tensor:
        """Single rows of the stored weights, ids [n]: float32 [n, K]."""
        return self.codes[ids].float() * self.scales[ids, None]

    def lookup(self, dtype: torch.dtype) -> nn.Module:
        """Rows of this very table."""
        return Lookup(self, dtype)

    def ledger(self) -> dict[str, int]:
        """A byte a code, four a row's scale."""
        return {**super().ledger(), "codes": self.codes.numel(), "scales": 4 * self.scales.numel()}

    @classmethod
    def joined(cls, parts: Sequence[Any]) -> Self:
        """Rows of all parts."""
        whole = (torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), join_bias(parts))
        return cls(*whole, **parts[0].facts())
