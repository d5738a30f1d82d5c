"""GEAR's store against numpy's singular values, exact settings, and the store of KIVI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.driving import attached, generate, make_session, prefill, prompt
from workers.mechanisms.gear_store import GearStore, LowRank, extremes
from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.quantized_cache import QuantizedStore, quantized_share
from workers.policies.kv.gear import Gear
from workers.policies.kv.kivi import Kivi
from workers.policies.kv.snapkv import SnapKV


def random_kv(entries: int, heads: int = 2, width: int = 16) -> tuple[Tensor, Tensor]:
    """Correlated entries with channel outliers in the keys and a few large numbers in the values."""
    g = torch.Generator().manual_seed(0)
    common = torch.randn(2, 1, heads, entries, 3, generator=g) @ torch.randn(2, 1, heads, 3, width, generator=g)
    keys, values = common + 0.3 * torch.randn(2, 1, heads, entries, width, generator=g)
    wild = torch.rand(values.shape, generator=g) < 0.01
    return keys + 5 * torch.randn(1, heads, 1, width, generator=g), values + 20 * wild


def errors(store: QuantizedStore, keys: Tensor, values: Tensor) -> list[float]:
    return [float((got - x).norm()) for got, x in zip(store.read(), (keys, values), strict=True)]


def test_the_numbers_at_both_ends_by_hand() -> None:
    x = torch.tensor([[5.0, -9, 1, 2, 8, 3, 0, 4, 6, 7], [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert [x[0][m].tolist() for m in extremes(x[:1], 0.3)] == [[-9, 8, 7]]  # of three, the odd one is the largest
    assert [row.nonzero()[:, 0].tolist() for row in extremes(x, 0.2)] == [[1, 4], [0, 9]]
    assert not extremes(x, 0.04).any()  # 0.4 of a number
    assert extremes(x, 1.0).all()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_low_rank_is_nearly_the_best(rank: int) -> None:
    x = random_kv(70)[1]
    error = (LowRank.of(x, rank).read() - x).double().norm(dim=(2, 3))[0].numpy()
    for head in range(2):
        best = np.sqrt((np.linalg.svd(x[0, head].numpy().astype(np.float64), compute_uv=False)[rank:] ** 2).sum())
        assert best <= error[head] + 1e-6
        assert error[head] <= 1.05 * best + 1e-3 * float(x[0, head].norm())  # factors have 11 bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_less_is_missed_than_by_kivi_and_nothing_at_the_exact_settings(bits: int) -> None:
    keys, values = random_kv(96)
    plain = errors(QuantizedStore(keys, values, bits, 32, 0), keys, values)

    def mended(rank: int, outliers: float) -> list[float]:
        return errors(GearStore(keys, values, bits, 32, 0, rank, outliers), keys, values)

    assert mended(0, 0.0) == plain
    for better, worse in zip(mended(4, 0.0), plain, strict=True):
        assert better < worse
    for better, worse in zip(mended(4, 0.1), mended(4, 0.0), strict=True):
        assert better < 0.8 * worse
    assert mended(0, 1.0) == [0.0, 0.0]
    assert all(e < 2.0**-10 * worse for e, worse in zip(mended(16, 0.0), plain, strict=True))  # rounding of the factors


def test_bytes_follow_the_formula() -> None:
    heads, width, group, residual, entries, rank, share = 2, 16, 32, 10, 111, 3, 0.1
    store = GearStore(*random_kv(entries, heads, width), 4, group, residual, rank, share)
    packed = 96
    plain = QuantizedStore(*random_kv(entries, heads, width), 4, group, residual).nbytes()
    factors = 2 * heads * (packed * rank + rank * width) * 2
    of_keys = heads * width * 10 * (4 + 4)  # a tenth of 96, rounded; a number and its place
    fullest = store._old[1].outliers.places.shape[2]  # an entry has 3 among both heads, so heads differ
    assert packed * 3 / 2 <= fullest < packed * 3
    assert store.nbytes() == plain + factors + of_keys + heads * fullest * (4 + 4)


@pytest.mark.parametrize("rank", [0, 2])
def test_evicting_moves_what_is_stored_and_keeps_outliers_exact(rank: int) -> None:
    """Heads lose different numbers of packed entries, several times, with growth by blocks between."""
    keys, values = random_kv(300, heads=3)
    store = GearStore(keys[:, :, :100], values[:, :, :100], 2, 8, 8, rank, outliers=0.1)
    seen, g, uneven = 100, torch.Generator().manual_seed(3), 0
    origin = torch.arange(100).expand(1, 3, 100)
    for _ in range(6):
        before, spare = store.read(), store.clone()
        index = torch.rand(1, 3, store.length, generator=g).topk(store.length * 2 // 3, dim=-1).indices.sort(-1).values
        store.keep(index)
        for got, x, same in zip(store.read(), before, spare.read(), strict=True):
            torch.testing.assert_close(got, gather_entries(x, index), rtol=0, atol=1e-5)
            assert torch.equal(same, x)
        assert all(torch.allclose(a, b[:, 1:2], atol=1e-5) for a, b in zip(store.heads(1, 2).read(), store.read(), strict=True))
        uneven += store._packed is not None
        store.append(keys[:, :, seen : seen + 25], values[:, :, seen : seen + 25])
        seen += 25
        origin = torch.cat((origin.gather(2, index), torch.arange(seen - 25, seen).expand(1, 3, 25)), 2)
    assert uneven
    expected = gather_entries(values, origin)
    large = expected > 15  # at most three an entry
    assert large.sum() > 20
    assert torch.equal(store.read()[1][large], expected[large])


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
def test_more_exact_than_kivi_behind_an_evictor(heads: str) -> None:
    session, ids = make_session(), prompt(90)
    evictor = SnapKV(keep=0.8, window=8, heads=heads)
    with attached(session, evictor):
        exact = prefill(session, ids)
    missed = []
    for policy in (Kivi(bits=2, group_size=8, residual=8), Gear(group_size=8, residual=8, outliers=0.1)):
        with attached(session, evictor, policy):
            state = prefill(session, ids)
            assert quantized_share(state.cache) > 0.7
            trace = generate(session, [ids, prompt(40, seed=1)], new=12)
        assert trace.counts["quantized_kv_share"] > 0.5
        assert session.acted[policy.card.id] > 0
        both = zip(state.cache.layers, exact.cache.layers, strict=True)
        missed.append(sum(float((a.held().keys - b.held().keys).norm()) for a, b in both))
    assert missed[1] < 0.8 * missed[0]
