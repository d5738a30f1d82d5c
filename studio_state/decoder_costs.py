"""What a decoder-only language model costs by its shape alone, before it is there: operations, bytes, roofline time, memory.

Yuan et al. 2024 (LLM-Viewer), arXiv:2402.16363, section 3 and the released code. A step feeds T new tokens of each of b texts that
are S tokens long then; a map i -> o does 2 i o b T operations. Attention writes its scores and reads them, as code that is
not fused does. :class:`Quirks` are places where the released code counts otherwise than it should: on, its published
figures come out digit by digit; off (the default), operations are those that PyTorch counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from studio_state.costs import Device, Work

DecoderPhase = Literal["prefill", "decode"]


class Decoder(BaseModel):
    """Shape of a Llama-like model: gated FFN, no biases, its output head not counted among the layers.

    Attributes:
        hidden, ffn: widths.
        heads, kv_heads: of queries, and of keys and values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    ffn: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    vocab: int = Field(gt=0)

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear map of a layer."""
        h, kv, f = self.hidden, self.hidden * self.kv_heads // self.heads, self.ffn
        return {
            "q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h),
            "gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h),
        }  # fmt: skip


class Bits(NamedTuple):
    """Bits of a weight, of an activation, and of a cached key or value."""

    weights: int = 16
    activations: int = 16
    cache: int = 16

    @property
    def products(self) -> str:
        """Format whose peak counts: integers only where all three have at most 8 bits (weights alone are unpacked to floats)."""
        return "int8" if max(self) <= 8 else "float16"


class Quirks(NamedTuple):
    """Where the released code of LLM-Viewer departs from what it means to count; all on for its own figures.

    Attributes:
        half_head: the output head is one operation a weight, for one text of the batch where activations are concerned.
        narrow_gate: the activation of the FFN has the model's width, not the FFN's.
        query_as_key: in the prefill the queries are read as a second set of keys.
    """

    half_head: bool = False
    narrow_gate: bool = False
    query_as_key: bool = False


HALF, MENDED, RELEASED = Bits(), Quirks(), Quirks(True, True, True)


class Operation(NamedTuple):
    """One kind of operation.

    Attributes:
        work: of one of them; ``times`` how many there are.
        written: bytes of activations among it that are written.
    """

    work: Work
    times: int
    written: float


def operations(
    model: Decoder, phase: DecoderPhase, length: int, batch: int = 1, bits: Bits = HALF, quirks: Quirks = MENDED
) -> list[Operation]:
    """All of one step: the prefill of ``length`` tokens, or one new token at that length.

    Args:
        length: tokens of each text, in the decode step those that are cached.
    """
    tokens = length if phase == "prefill" else 1
    return [*_maps(model, tokens, batch, bits), *_attention(model, phase, length, batch, bits, quirks),
            *_rest(model, tokens, batch, bits, quirks), _head(model, batch, bits, quirks)]  # fmt: skip


def _maps(model: Decoder, tokens: int, batch: int, bits: Bits) -> Iterator[Operation]:
    rows, w, a, kv = batch * tokens, *(b / 8 for b in bits)
    for name, (i, o) in model.maps.items():
        cached = name in ("k_proj", "v_proj")
        out = 0.0 if cached else o * rows * a
        work = Work(name=name, flops=2 * i * o * rows, weight_bytes=i * o * w, activation_bytes=i * rows * a + out,
                    kv_bytes=o * rows * kv if cached else 0)  # fmt: skip
        yield Operation(work, model.layers, out)


def _attention(model: Decoder, phase: DecoderPhase, length: int, batch: int, bits: Bits, quirks: Quirks) -> Iterator[Operation]:
    tokens, a, kv = length if phase == "prefill" else 1, bits.activations / 8, bits.cache / 8
    flops = 2 * tokens * length * model.hidden * batch
    scores = tokens * length * model.heads * batch * a
    queries, stored = tokens * model.hidden * batch * a, length * model.maps["k_proj"][1] * batch * kv
    twice = phase == "prefill" and quirks.query_as_key
    asked = Work(name="queries with keys", group="attention", flops=flops, kv_bytes=stored * (1 + twice),
                 activation_bytes=scores + (0 if twice else queries))  # fmt: skip
    yield Operation(asked, model.layers, scores)
    read = Work(name="scores with values", group="attention", flops=flops, kv_bytes=stored, activation_bytes=scores + queries)
    yield Operation(read, model.layers, queries)
    softmax = 5 * tokens * length * model.heads * batch  # largest, difference, exponential, sum, division
    yield Operation(Work(name="softmax", group="attention", flops=softmax, activation_bytes=2 * scores), model.layers, scores)


def _rest(model: Decoder, tokens: int, batch: int, bits: Bits, quirks: Quirks) -> Iterator[Operation]:
    rows, a = batch * tokens, bits.activations / 8
    gate = rows * (model.hidden if quirks.narrow_gate else model.ffn)
    for name, numbers, each, read, times in (
        ("norm", rows * model.hidden, 7, 1, 2),
        ("residual", rows * model.hidden, 1, 1, 2),
        ("activation", gate, 2, 2, 1),
    ):
        work = Work(name=name, group="rest", flops=each * numbers, activation_bytes=(read + 1) * numbers * a)
        yield Operation(work, times * model.layers, numbers * a)


def _head(model: Decoder, batch: int, bits: Bits, quirks: Quirks) -> Operation:
    """One token of each text, in both phases."""
    weights, rows = model.hidden * model.vocab, 1 if quirks.half_head else batch
    written = model.vocab * rows * bits.activations / 8
    read = model.hidden * rows * bits.activations / 8
    flops = (1 if quirks.half_head else 2) * batch * weights
    return Operation(
        Work(name="head", flops=flops, weight_bytes=weights * bits.weights / 8, activation_bytes=read + written), 1, written
    )


def seconds(some: Sequence[Operation], device: Device, bits: Bits = HALF) -> float:
    """The least time of a step that the roofline allows."""
    return sum(o.times * o.work.seconds(device, bits.products) for o in some)


def intensity(some: Sequence[Operation]) -> float:
    """Operations a byte of a whole step."""
    return sum(o.times * o.work.flops for o in some) / sum(o.times * o.work.bytes for o in some)


def limit(some: Sequence[Operation], device: Device, bits: Bits = HALF) -> Literal["memory", "compute"]:
    """What takes the larger part of a step's roofline time."""
    slow = sum(o.times * o.work.seconds(device, bits.products) for o in some if o.work.bound(device, bits.products) == "memory")
    return "memory" if slow >= seconds(some, device, bits) / 2 else "compute"


def peak_bytes(model: Decoder, length: int, batch: int = 1, bits: Bits = HALF, quirks: Quirks = MENDED) -> float:
    """Memory of a decode step: weights of all layers (not of head and embedding), the cache, and what one layer writes."""
    step = operations(model, "decode", length, batch, bits, quirks)
    layers = [o for o in step if o.work.name != "head"]
    weights = sum(o.times * o.work.weight_bytes for o in layers)
    cache = 2 * model.layers * length * batch * model.maps["k_proj"][1] * bits.cache / 8
    return weights + cache + sum(o.times / model.layers * o.written for o in layers)
