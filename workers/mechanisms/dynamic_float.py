"""Linear maps whose weights' exponents are stored in a prefix code: fewer bytes, every bit comes back.

A bfloat16 number has a sign, 8 bits of exponent and 7 of mantissa. Exponents of a trained matrix take few values, so their code
needs under three bits on average; sign and mantissa are stored as one plain byte. A float32 number is a bfloat16 number and 16
more bits of mantissa, which are stored as they are, or not at all where they are zero in the whole matrix.

Shapes: N output rows, K inputs, n = N * K.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from workers.mechanisms.exact_linear import ExactLinear
from workers.mechanisms.linear import Lookup
from workers.mechanisms.prefix_code import LANE, Coded, decode, decode_lanes, encode

FORMATS = (torch.bfloat16, torch.float32)


class DynamicFloatLinear(ExactLinear):
    """Weights as coded exponents and plain sign-and-mantissa bytes.

    Args:
        mantissas: uint8 [n], the sign in the highest bit; rest: int16 [n], lower halves of float32 numbers, or None.
        words, lanes, blocks, lengths: the exponents (:class:`workers.mechanisms.prefix_code.Coded`).
        coded_bits: of the n codes, without what fills lanes and blocks.
        out_features: N.
        turned: the weights lie in memory as [K, N].
        number_format: bfloat16 or float32.
        bias: [N].
    """

    mantissas: Tensor
    rest: Tensor | None
    words: Tensor
    lanes: Tensor
    blocks: Tensor
    lengths: Tensor

    def __init__(
        self,
        mantissas: Tensor,
        rest: Tensor | None,
        words: Tensor,
        lanes: Tensor,
        blocks: Tensor,
        lengths: Tensor,
        coded_bits: int,
        out_features: int,
        turned: bool,
        number_format: torch.dtype,
        bias: Tensor | None,
    ):
        super().__init__(len(mantissas) // out_features, out_features, bias)
        self.coded_bits, self.turned, self.number_format = coded_bits, turned, number_format
        held = {"mantissas": mantissas, "rest": rest, "words": words, "lanes": lanes, "blocks": blocks, "lengths": lengths}
        for name, tensor in held.items():
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Code weights [N, K], bfloat16 or float32."""
        turned = not weight.is_contiguous() and weight.T.is_contiguous()
        flat = (weight.T if turned else weight.contiguous()).flatten()
        rest = None
        if flat.dtype == torch.float32:
            whole = flat.view(torch.int32)
            below = whole.to(torch.int16)  # the lower half, wrapped
            upper, rest = (whole >> 16).to(torch.int16), below if bool(below.any()) else None
        else:
            upper = flat.view(torch.int16)
        exponents = ((upper >> 7) & 0xFF).to(torch.uint8)
        mantissas = (((upper >> 8) & 0x80) | (upper & 0x7F)).to(torch.uint8)
        coded = encode(exponents)
        coded_bits = int((torch.bincount(exponents, minlength=256) * coded.lengths).sum())
        return cls(mantissas, rest, *coded, coded_bits, weight.shape[0], turned, weight.dtype, bias)

    def decoded(self) -> Tensor:
        """[N, K], every bit as it was; decoded piece by piece into one matrix."""
        flat = torch.empty(len(self.mantissas), dtype=self.number_format, device=self.mantissas.device)
        start = 0
        for exponents in decode(self._coded()):
            part = slice(start, start + len(exponents))
            mantissas = self.mantissas[part]
            rest = None if self.rest is None else self.rest[part]
            flat[part] = self._assembled(exponents[: len(mantissas)], mantissas, rest)
            start += len(exponents)
        return flat.view(-1, self.out_features).T if self.turned else flat.view(self.out_features, -1)

    def rows(self, ids: Tensor) -> Tensor:
        """Single rows, ids [m]: [m, K]; only the lanes that they lie in are decoded.

        Raises:
            ValueError: a table that lies in memory column by column has no rows to read.
        """
        if self.turned:
            raise ValueError("the weights lie column by column; a row cannot be decoded by itself, take decoded()")
        width = self.in_features
        first, spare = ids * width // LANE, torch.arange((width - 1) // LANE + 2, device=ids.device)
        lanes = (first[:, None] + spare).clamp_(max=len(self.lanes) - 1)
        symbols = decode_lanes(self._coded(), lanes.flatten()).reshape(len(ids), -1)
        inside = (ids * width % LANE)[:, None] + torch.arange(width, device=ids.device)
        rest = None if self.rest is None else self.rest.view(-1, width)[ids]
        return self._assembled(symbols.gather(1, inside), self.mantissas.view(-1, width)[ids], rest)

    def _coded(self) -> Coded:
        return Coded(self.words, self.lanes, self.blocks, self.lengths)

    def _assembled(self, exponents: Tensor, mantissas: Tensor, rest: Tensor | None) -> Tensor:
        """Numbers of their parts, uint8 each; the rest int16."""
        signed = mantissas.to(torch.int16)
        upper = (signed & 0x80) << 8 | exponents.to(torch.int16) << 7 | signed & 0x7F
        if self.number_format == torch.bfloat16:
            return upper.view(torch.bfloat16)
        whole = upper.to(torch.int32) << 16
        return (whole if rest is None else whole | rest.to(torch.int32) & 0xFFFF).view(torch.float32)

    @property
    def bits(self) -> float:
        """Of one weight on average: a byte, its code, and the rest of a float32 number."""
        return 8 + self.coded_bits / len(self.mantissas) + (0 if self.rest is None else 16)

    def parts(self) -> dict[str, int]:
        """Bytes by what they hold."""
        names = ("mantissas", "rest", "words", "lanes", "blocks", "lengths", "bias")
        return {name: self.table_bytes(name) for name in names}

    def ledger(self) -> dict[str, int]:
        """Lanes, blocks and code lengths count as scales; what fills lanes and blocks up as padding."""
        parts, code = self.parts(), -(-self.coded_bits // 8)
        return {
            "codes": parts["mantissas"] + parts["rest"] + code,
            "scales": parts["lanes"] + parts["blocks"] + parts["lengths"],
            "padding": parts["words"] - code,
            "bias": parts["bias"],
        }

    def lookup(self, dtype: torch.dtype) -> nn.Module | None:
        """Rows of this very table."""
        return None if self.turned else Lookup(self, dtype)
