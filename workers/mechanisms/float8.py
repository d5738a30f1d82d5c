"""Linear maps with weights in 8-bit floats and a scale a row.

Shapes: m input rows, N output rows, K inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from workers.mechanisms.linear import join_bias
from workers.mechanisms.packed_linear import PackedLinear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TINY = torch.finfo(torch.float32).tiny
_KERNEL_WIDTH = 16  # divides both widths of what the CUDA product takes
_HOPPER = (9, 0)  # the first compute capability with a product of row-wise scales


def to_float8(rows: Tensor, form: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [n, K] as 8-bit floats [n, K] and float32 steps [n]: the largest value of a row becomes the format's largest."""
    top = torch.finfo(form).max
    steps = rows.float().abs().amax(1) / top
    steps = torch.where(steps >= _TINY, steps, torch.ones_like(steps))
    return (rows.float() / steps[:, None]).clamp_(-top, top).to(form), steps


def scaled_product(x: Tensor, steps: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """8-bit floats [m, K] with steps [m] times codes [N, K] with scales [N], transposed, by one kernel: [m, N]."""
    return torch._scaled_mm(x, codes.T, scale_a=steps[:, None], scale_b=scales[None], out_dtype=dtype)


class Float8Linear(PackedLinear):
    """8-bit floats with a scale a row, unpacked for every product unless both sides are 8-bit floats on a GPU that multiplies them.

    Args:
        codes: float8 [N, K]; scales: float32 [N]; bias: [N].
        activations: round activations too, to e4m3 with a step a token.
    """

    codes: Tensor
    scales: Tensor
    bits = 8.0

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, activations: bool):
        super().__init__(codes.shape[1], codes.shape[0], bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        if not self.activations:
            return super().forward(x)
        rows, steps = to_float8(x.reshape(-1, self.in_features), E4M3)
        if self.has_product():
            y = scaled_product(rows, steps, self.codes, self.scales, torch.bfloat16).to(x.dtype)
            y = (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], self.out_features)
            return y
        return super().forward((rows.float() * steps[:, None]).to(x.dtype).reshape(x.shape))

    def has_product(self) -> bool:
        """Whether the GPU multiplies these: e4m3 on both sides, widths that 16 divides, and a Hopper or newer."""
        fits = not self.in_features % _KERNEL_WIDTH and not self.out_features % _KERNEL_WIDTH and self.codes.dtype == E4M3
        return fits and self.codes.is_cuda and torch.cuda.get_device_capability(self.codes.device) >= _HOPPER

    def unpacked(self, start: int, dtype: torch.dtype) -> Tensor:
        """Rows [n, K]."""
        stop = start + self.STEP
        return (self.codes[start:stop].float() * self.scales[start:stop, None]).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [n, K]."""
        return self.codes.view(torch.uint8)[ids].view(self.codes.dtype).float() * self.scales[ids, None]

    def ledger(self) -> dict[str, int]:
        """A byte a code, four a row's scale."""
        return {**super().ledger(), "codes": self.codes.numel(), "scales": 4 * self.scales.numel()}

    def layout(self) -> Hashable:
        """Same format and activations."""
        return (*super().layout(), self.codes.dtype, self.activations)  # type: ignore[misc]

    @classmethod
    def joined(cls, parts: Sequence[Float8Linear]) -> Float8Linear:
        """Rows of all parts."""
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(parts[0].codes.dtype)
        return cls(codes, torch.cat([p.scales for p in parts]), join_bias(parts), parts[0].activations)
