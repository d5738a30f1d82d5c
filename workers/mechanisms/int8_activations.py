"""Linear maps with 8-bit weights and activations: the one place that touches PyTorch's deprecated quantized operators."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from workers.mechanisms.linear import Replacement, join_bias

ENGINE = "fbgemm"  # the fastest of fbgemm, onednn and x86 for one row (measured, AVX-512 VNNI); keeps no second copy
_ROW_BYTES = 12  # scale, zero point and sum of a row, 4 bytes each


def quantise(weight: Tensor) -> Tensor:
    """Float [N, K] as a per-row symmetric qint8 tensor, with the scales of PyTorch's per-channel observer."""
    largest = weight.float().abs().amax(1)
    scales = (largest / 127.5).clamp_min(torch.finfo(torch.float32).eps)
    return per_row(weight.float(), scales)


def per_row(weight: Tensor, scales: Tensor) -> Tensor:
    """Round [N, K] to multiples of the row scales [N]."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per", UserWarning)  # the deprecation this file exists for
        return torch.quantize_per_channel(weight.contiguous(), scales, torch.zeros_like(scales, dtype=torch.long), 0, torch.qint8)


class DynamicInt8Linear(Replacement):
    """int8 weights inside fbgemm's packed object, int8 activations found at every call.

    Args:
        weight: per-row qint8 [N, K]; bias: float32 [N].
        by_token: scale every token by itself.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, by_token: bool):
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.by_token = by_token
        self.reduce_range = not (by_token and torch.cpu._is_vnni_supported())
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = ENGINE
        try:
            self.packed = torch.ops.quantized.linear_prepack(weight, None if by_token else bias)
        finally:
            torch.backends.quantized.engine = before

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] -> [..., N]."""
        if not self.by_token:
            return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=self.reduce_range)
        if x.numel() == x.shape[-1]:
            y = torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=self.reduce_range)
        else:  # the operator knows one scale for all: bring every token to the same range, and back
            size = x.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
            y = torch.ops.quantized.linear_dynamic(x / size, self.packed, reduce_range=self.reduce_range).mul_(size)
        return y if self.bias is None else y + self.bias

    def codes(self) -> Tensor:
        """The quantized weights [N, K], taken out of the packed object."""
        weight: Tensor = torch.ops.quantized.linear_unpack(self.packed)[0]
        return weight

    def matrix(self) -> Tensor:
        """Their values as float32 [N, K]."""
        return self.codes().dequantize()

    def hidden_bytes(self) -> int:
        """Codes and row data of the packed object; fbgemm's padding of its blocks cannot be seen from here."""
        return self.out_features * (self.in_features + _ROW_BYTES)

    def layout(self) -> Hashable:
        """Equal width and scaling of activations."""
        return (*super().layout(), self.by_token)  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[DynamicInt8Linear]) -> DynamicInt8Linear:
        """Rows of all parts: the same codes and scales."""
        weights = [p.codes() for p in parts]
        scales = torch.cat([w.q_per_channel_scales() for w in weights])
        return cls(per_row(torch.cat([w.dequantize() for w in weights]), scales), join_bias(parts), parts[0].by_token)
