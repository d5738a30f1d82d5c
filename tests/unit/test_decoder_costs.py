"""Costs by shape alone: LLM-Viewer's published figures in its own way of counting, and what is mended in ours."""

from __future__ import annotations

import pytest

from studio_state.costs import Device, total
from studio_state.decoder_costs import RELEASED, Bits, Decoder, Quirks, intensity, limit, operations, peak_bytes, seconds
from studio_state.devices import published

LLAMA2_7B = Decoder(layers=32, hidden=4096, ffn=11008, heads=32, kv_heads=32, vocab=32000)
# as the released code lists them
A6000 = Device(name="RTX A6000", bandwidth=768e9, peak={"float16": 309.677e12 / 2, "int8": 309.7e12})
H100 = Device(name="H100 SXM", bandwidth=3072e9, peak={"float16": 1979e12 / 2, "int8": 3958e12 / 2})
LENGTH = 2048


@pytest.mark.parametrize(
    ("device", "batch", "bits", "decode_ms", "prefill_ms", "gigabytes"),
    [
        (A6000, 1, Bits(16, 16, 16), 18.637, 226.88, 14.026),
        (A6000, 1, Bits(4, 16, 16), 5.732, 226.62, 4.312),
        (A6000, 1, Bits(4, 4, 4), 4.659, 100.35, None),
        (A6000, 16, Bits(16, 16, 16), 40.10, None, 30.138),
        (H100, 1, Bits(16, 16, 16), 4.659, 40.70, None),
    ],
)
def test_llama_2_7b_as_the_released_code_counts_it(
    device: Device, batch: int, bits: Bits, decode_ms: float, prefill_ms: float | None, gigabytes: float | None
) -> None:
    """Every figure that the code gives for 2,048 tokens, to all digits that we have of it."""
    decode = operations(LLAMA2_7B, "decode", LENGTH, batch, bits, RELEASED)
    assert 1e3 * seconds(decode, device, bits) == pytest.approx(decode_ms, abs=0.005 if batch > 1 else 0.0005)
    if prefill_ms:
        prefill = operations(LLAMA2_7B, "prefill", LENGTH, batch, bits, RELEASED)
        assert 1e3 * seconds(prefill, device, bits) == pytest.approx(prefill_ms, abs=0.005)
    if gigabytes:
        assert peak_bytes(LLAMA2_7B, LENGTH, batch, bits, RELEASED) / 1e9 == pytest.approx(gigabytes, abs=0.0005)
    if bits == Bits() and batch == 1:
        assert intensity(decode) == pytest.approx(0.990, abs=0.0005)


def test_one_map_and_attention_by_hand() -> None:
    found = {
        o.work.name: o
        for o in operations(Decoder(layers=3, hidden=8, ffn=20, heads=4, kv_heads=2, vocab=10), "decode", 5, 2, Bits(4, 16, 8))
    }
    up, k = found["up_proj"], found["k_proj"]
    assert (up.work.flops, up.work.weight_bytes, up.work.activation_bytes, up.written) == (2 * 8 * 20 * 2, 80, 32 + 80, 80)
    assert (k.work.flops, k.work.kv_bytes, k.work.activation_bytes, k.times) == (2 * 8 * 4 * 2, 8, 32, 3)
    scores = 5 * 4 * 2 * 2  # stored tokens, heads, texts, bytes
    asked = found["queries with keys"].work
    assert (asked.flops, asked.kv_bytes, asked.activation_bytes) == (2 * 5 * 8 * 2, 5 * 4 * 2, scores + 32)
    assert (found["softmax"].work.flops, found["softmax"].work.activation_bytes) == (5 * 40, 2 * scores)
    assert (found["head"].work.flops, found["head"].times, found["norm"].times) == (2 * 8 * 10 * 2, 1, 6)


def test_what_is_mended_changes_what_it_is_about_and_nothing_else() -> None:
    for phase in ("prefill", "decode"):
        ours, theirs = ({o.work.name: o for o in operations(LLAMA2_7B, phase, 256, 4, Bits(), q)} for q in (Quirks(), RELEASED))
        changed = {name for name in ours if ours[name] != theirs[name]}
        assert changed == {"head", "activation", *(["queries with keys"] if phase == "prefill" else [])}
    assert ours["head"].work.flops == 2 * theirs["head"].work.flops


def test_integers_count_only_where_all_three_are_small() -> None:
    assert [Bits(*b).products for b in ((4, 16, 16), (8, 8, 16), (8, 8, 8), (4, 4, 4))] == ["float16", "float16", "int8", "int8"]


@pytest.mark.parametrize("device", [*published().values(), A6000, H100], ids=lambda d: d.name)
def test_decoding_is_bound_by_memory_a_long_prompt_by_products_and_four_bits_help_only_the_first(device: Device) -> None:
    decode, prefill = (operations(LLAMA2_7B, phase, LENGTH) for phase in ("decode", "prefill"))
    assert (limit(decode, device), limit(prefill, device)) == ("memory", "compute")
    gains = [
        seconds(plain, device) / seconds(operations(LLAMA2_7B, phase, LENGTH, bits=Bits(4)), device, Bits(4))
        for phase, plain in (("decode", decode), ("prefill", prefill))
    ]
    assert gains[0] > 2.5
    assert gains[1] == pytest.approx(1, abs=0.01)
    maps = total((o.work for o in decode if o.work.weight_bytes), "maps", "maps")
    assert maps.intensity < 2
