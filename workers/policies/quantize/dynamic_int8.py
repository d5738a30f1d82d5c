"""Dynamic int8: the one place that touches PyTorch's deprecated quantized operators."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.linear import Replacement, bias_of, join_bias, matrix_of, replacements, replacing
from workers.methods import Policy, card, knob
from workers.session import Session

ENGINE = "fbgemm"  # the fastest of fbgemm, onednn and x86 for one row (measured, AVX-512 VNNI); keeps no second copy
_ROW_BYTES = 12  # scale, zero point and sum of a row, 4 bytes each


class DynamicInt8(Policy):
    """Store linear weights in 8 bits and multiply with activations rounded to 8 bits on the fly.

    Weights have one symmetric scale an output row. Activations are scaled by token, and use all 8 bits
    where the processor has VNNI (7 elsewhere, where sums could overflow). ``activations=tensor`` is what
    ``torch.ao.quantization.quantize_dynamic`` does: 7 bits and one scale for all tokens of a forward, so
    results depend on how prompts are chunked, and one outlier coarsens all tokens. An embedding tied to
    the output head stays a float table beside the head's packed one.
    """

    card: ClassVar[Card] = card(
        id="dynamic-int8",
        title="Dynamic int8",
        stage="quantize",
        families=("llm", "vlm", "vit"),
        owns=("weights.format",),
        effects={"weight_bytes": "down"},
        hopes={"decode_tokens_per_s": "up"},
        neutral=None,
        not_neutral_because="every setting rounds weights and activations to 8 bits",
        requires=(f"cpu:{ENGINE}",),
        dtypes=("float32",),
        devices=("cpu",),
        alters_weights=True,
    )
    activations: Literal["token", "tensor"] = knob(
        "token",
        help="what shares an activation scale: each token its own (more exact), or all tokens of a forward (as PyTorch does)",
    )
    head: bool = knob(True, help="quantize the output head too; off = slower, its scores stay exact")

    def prepare(self, session: Session) -> None:
        """Pack all weights.

        Raises:
            SpecError: not float32, or not on a CPU.
        """
        self.check(session)
        replacements(session, self)

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Put the quantized modules in."""
        self.check(session)
        return replacing(session, self)

    def check(self, session: Session) -> None:
        """The operators know one number format and one kind of device.

        Raises:
            SpecError: not float32, or not on a CPU.
        """
        if session.dtype != torch.float32 or session.device.type != "cpu":
            raise SpecError(
                f"dynamic-int8 works on float32 models on a CPU; this experiment is {str(session.dtype).removeprefix('torch.')} "
                f"on {session.device.type}: set dtype to float32 and the device to cpu, or take rtn instead"
            )

    def replacement(self, source: nn.Module, head: bool) -> Replacement | None:
        """The quantized form of one linear module."""
        if head and not self.head:
            return None
        return DynamicInt8Linear(quantise(matrix_of(source).detach()), bias_of(source), self.activations == "token")

    def weight_factor(self, bits: int) -> float:
        """8 bits a weight over those of the baseline."""
        return 8 / bits


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
