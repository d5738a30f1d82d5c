"""Linear maps with 8-bit weights and activations: the one place that touches PyTorch's deprecated quantized operators."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def of_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """The per-row qint8 tensor of codes int8 [N, K] and row scales [N], as they are."""
    return torch._make_per_channel_quantized_tensor(codes, scales, torch.zeros_like(scales, dtype=torch.long), 0)


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

    def facts(self) -> dict[str, Any]:
        """How activations are scaled."""
        return {"by_token": self.by_token}

    def tensors(self) -> dict[str, Tensor]:
        """The weights taken out of the packed object: codes int8 [N, K] and scales [N]; and the bias."""
        weight = self.codes()
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"codes": weight.int_repr(), "scales": weight.q_per_channel_scales(), **bias}

    def computed_bytes(self) -> int:
        """Of a row's data, what is not its scale (8 bytes when it is taken out)."""
        return (_ROW_BYTES - 8) * self.out_features

    @classmethod
    def rebuild(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], inside: Mapping[str, nn.Module], like: nn.Module
    ) -> DynamicInt8Linear:
        """Codes and scales packed again: the same object."""
        weight = of_codes(tensors["codes"], tensors["scales"])
        return super().rebuild(facts, {"weight": weight, **{n: t for n, t in tensors.items() if n == "bias"}}, inside, like)

    bits = 8.0

    def ledger(self) -> dict[str, int]:
        """A byte a code, and the row data of the packed object."""
        return {**super().ledger(), "codes": self.out_features * self.in_features, "scales": _ROW_BYTES * self.out_features}

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
