"""KIVI and its packed store, against hand-worked groups and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.driving import generate, make_session, prefill, prompt
from workers.families.llm import State
from workers.mechanisms.kv_store import FloatStore
from workers.mechanisms.quantized_cache import QuantizedStore, pack_bits, quantize, quantized_share, unpack_bits
from workers.methods import Policy
from workers.policies.kv.h2o import H2O
from workers.policies.kv.kivi import Kivi
from workers.policies.kv.knorm import KNorm
from workers.policies.kv.snapkv import SnapKV
from workers.policies.kv.streamingllm import StreamingLLM


def random_kv(entries: int, heads: int = 2, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, heads, entries, width, generator=g) + 5 * torch.randn(1, 1, 1, width, generator=g)  # channel outliers
    return keys, torch.randn(1, heads, entries, width, generator=g)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bits_round_trip(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 16), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 5, 16 * bits // 8)
    assert torch.equal(unpack_bits(packed, bits), codes)


def test_bytes_of_packed_codes_by_hand() -> None:
    assert pack_bits(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack_bits(torch.tensor([10, 5], dtype=torch.uint8), 4).tolist() == [0x5A]


def test_one_group_by_hand() -> None:
    codes, scale, zero = quantize(torch.tensor([-1.0, 0.0, 0.9, 2.0]), 2, dim=-1)
    assert (float(zero), float(scale)) == (-1.0, 1.0)  # (2 - -1) / 3
    assert codes.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keys_per_channel_values_per_token(bits: int) -> None:
    """An independent numpy computation with the stored float16 scales: same codes, error within half a step."""
    keys, values = random_kv(64)
    store = QuantizedStore(keys, values, bits, group_size=32, residual=0)
    got_k, got_v = (x.numpy() for x in store.read())
    for x, got, axes in ((keys.numpy(), got_k, "channel"), (values.numpy(), got_v, "token")):
        blocks = x.reshape(1, 2, 2, 32, 16) if axes == "channel" else x.reshape(1, 2, 64, 1, 16)
        axis = 3 if axes == "channel" else 4
        low, high = blocks.min(axis, keepdims=True), blocks.max(axis, keepdims=True)
        step = (high - low) / (2**bits - 1)
        error = np.abs(got.reshape(blocks.shape) - blocks)
        assert (error <= step / 2 + 2.0**-9 * (np.abs(low) + step)).all()  # half a step; scale and zero have 11 bits
        assert error.max() > step.min() / 8  # it does round


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_stored_step(bits: int) -> None:
    noise = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    x = noise * torch.logspace(-4, 3, 200)[:, None] + torch.linspace(-50, 50, 200)[:, None]
    codes, scale, zero = quantize(x, bits, dim=-1)
    error = (codes.double() * scale.double() + zero.double() - x.double()).abs()
    assert bool((error <= scale.double() / 2 * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_follow_the_formula(bits: int) -> None:
    heads, width, group, residual, entries = 2, 16, 32, 10, 111
    store = QuantizedStore(*random_kv(entries, heads, width), bits, group, residual)
    packed = (entries - residual) // group * group
    codes = 2 * packed * width * bits // 8
    key_scales = packed // group * width * 2 * 2  # scale and zero, 2 bytes each
    value_scales = packed * 1 * 2 * 2  # the head is narrower than a group: one pair a token
    rest = 2 * (entries - packed) * width * 4
    assert packed == 96
    assert store.nbytes() == heads * (codes + key_scales + value_scales + rest)
    assert store.packed == packed


def test_newest_tokens_stay_exact_and_groups_are_whole() -> None:
    keys, values = random_kv(60)
    store = QuantizedStore(keys[:, :, :20], values[:, :, :20], 4, group_size=8, residual=8)
    for i in range(20, 60):
        store.append(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        newest = i + 1 - int(store.packed)
        assert store.packed % 8 == 0
        assert 8 <= newest <= 16
        assert torch.equal(store.read()[0][:, :, -newest:], keys[:, :, i + 1 - newest : i + 1])
    assert store.length == 60


def test_evicting_moves_codes_and_never_rounds_again() -> None:
    """Heads lose different numbers of packed entries, several times, with growth between."""
    keys, values = random_kv(300, heads=3)
    store = QuantizedStore(keys[:, :, :100], values[:, :, :100], 2, group_size=8, residual=8)
    seen, g = 100, torch.Generator().manual_seed(3)
    uneven = 0
    for _ in range(8):
        before = store.read()
        index = torch.stack([torch.randperm(store.length, generator=g)[: store.length * 2 // 3].sort().values for _ in range(3)])[
            None
        ]
        spare = store.clone()
        store.keep(index)
        expected = [x.gather(2, index[..., None].expand(-1, -1, -1, 16)) for x in before]
        for got, want in zip(store.read(), expected, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(spare.read(), before, strict=True):
            assert torch.equal(got, want)
        uneven += store._packed is not None
        store.append(keys[:, :, seen : seen + 25], values[:, :, seen : seen + 25])
        seen += 25
        assert torch.equal(store.read()[0][:, :, -25:], keys[:, :, seen - 25 : seen])
    assert uneven


def test_scales_that_nothing_needs_are_dropped() -> None:
    store = QuantizedStore(*random_kv(64), 4, group_size=8, residual=0)
    store.keep(torch.arange(48, 64).expand(1, 2, -1))
    per_head = 2 * 16 * 8 + 16 * 2 * 4 + 2 * 16 * 4 + 16 * 4  # codes, value scales, 2 key groups, group numbers
    assert store.nbytes() == 2 * per_head


def test_heads_and_crop() -> None:
    keys, values = random_kv(40)
    store = QuantizedStore(keys, values, 4, group_size=8, residual=4)
    part = store.heads(1, 2)
    assert all(torch.equal(a, b[:, 1:]) for a, b in zip(part.read(), store.read(), strict=True))
    assert 2 * part.nbytes() == store.nbytes()
    before = store.read()[0]
    store.crop(3)
    assert torch.equal(store.read()[0], before[:, :, :-3])
    with pytest.raises(RuntimeError, match="cannot be taken back"):
        store.crop(20)


EVICTORS: list[Policy] = [SnapKV(keep=0.5, window=8), KNorm(keep=0.5), H2O(keep=0.5), StreamingLLM(keep=0.5)]


def kept(state: State) -> list[Tensor]:
    return [g.logical(len(state.lengths), torch.device("cpu")) for layer in state.cache.layers for g in layer.groups]


@pytest.mark.parametrize("evictor", EVICTORS, ids=lambda p: p.card.id)
@pytest.mark.parametrize("chunk", [None, 13])
def test_an_evictor_keeps_the_same_entries_as_without(evictor: Policy, chunk: int | None) -> None:
    session = make_session(chunk_size=chunk)
    ids = prompt(80)
    with evictor.attach(session):
        alone = prefill(session, ids)
        with Kivi(bits=2, group_size=8, residual=4).attach(session):
            packed = prefill(session, ids)
    assert quantized_share(alone.cache) == 0
    assert quantized_share(packed.cache) > 0.7
    assert packed.cache.stored() == 40
    assert all(torch.equal(a, b) for a, b in zip(kept(alone), kept(packed), strict=True))
    assert torch.equal(alone.logits, packed.logits)


def test_decoding_attends_to_the_dequantized_copy() -> None:
    """One step over a packed cache equals a step over a float cache that holds its dequantized numbers."""
    session = make_session()
    ids, token = prompt(70), torch.tensor([[9]])
    with Kivi(bits=2, group_size=8, residual=8).attach(session):
        packed = prefill(session, ids)
    plain = prefill(session, ids)
    untouched = plain.cache.clone()
    for ours, theirs in zip(plain.cache.layers, packed.cache.layers, strict=True):
        ours.group.store = FloatStore()
        ours.group.store.append(*theirs.group.store.read())
    with torch.inference_mode():
        a, b = (session.family.step(session, s, token) for s in (packed, plain))
        c = session.family.step(session, State(untouched, packed.next_position - 1, packed.logits, [70], False), token)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a, c, atol=1e-2)


def test_the_share_is_told() -> None:
    session = make_session()
    with Kivi(group_size=8, residual=8).attach(session):
        trace = generate(session, [prompt(40)], new=9)
    # 48 cached at the end; what the last append (at 47 entries) could pack: (47 - 8) // 8 * 8 = 32
    assert trace.counts["quantized_kv_share"] == pytest.approx(32 / 48)
    assert session.acted["kivi"] > 0


def test_nearly_no_error_at_eight_bits_and_growing_error_below() -> None:
    session, ids = make_session(), prompt(80)
    base = prefill(session, ids)
    with torch.inference_mode():
        exact = session.family.step(session, base, torch.tensor([[9]]))
    errors = []
    for bits in (8, 4, 2):
        with Kivi(bits=bits, group_size=16, residual=0).attach(session), torch.inference_mode():
            got = session.family.step(session, prefill(session, ids), torch.tensor([[9]]))
        errors.append(float((got - exact).abs().max() / exact.abs().max()))
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[2]
