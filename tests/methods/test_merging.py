"""Merging on caches made by hand, against sums written out in numpy, entry by entry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from studio_state.errors import SpecError
from tests.methods.driving import make_session, prompt
from tests.methods.driving import prefill as prefilled
from workers.mechanisms.cache import PADDING, KVLayer
from workers.mechanisms.draws import position_draws
from workers.mechanisms.held import Held
from workers.mechanisms.merging import Following, Parting, Rule, alike, folded, into_nearest, nearest
from workers.mechanisms.quantized_cache import QuantizedStore

RULES: tuple[Rule, ...] = ("averaged", "pivotal", "weighted")


def held_by_hand(keys: list[list[float]], values: list[list[float]]) -> Held:
    """One row, one head."""
    return Held(*(torch.tensor(x, dtype=torch.float32)[None, None] for x in (keys, values)))


def random_held(padding: tuple[int, ...] = (0, 0), heads: int = 2, length: int = 12) -> Held:
    """Rows with so much padding in front, which holds what must never be seen."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(len(padding), heads, length, 4, generator=generator) for _ in range(2))
    places = torch.stack([torch.arange(length) - n for n in padding])[:, None]
    padded = places < 0
    keys.masked_fill_(padded.unsqueeze(-1), float("nan"))
    values.masked_fill_(padded.unsqueeze(-1), float("nan"))
    return Held(keys, values, places.masked_fill(padded, PADDING), any(padding))


# One head, four keys; the first and the last stay. The second points where the first does, the third nearer to the
# last (cosine 0.8) than to the first (0.6).
FOUR = held_by_hand([[1, 0], [2, 0], [3, 4], [0, 1]], [[10, 0], [20, 0], [0, 40], [0, 8]])
ENDS = torch.tensor([[[0, 3]]])


@pytest.mark.parametrize(
    ("rule", "keys", "values"),
    [
        ("averaged", [[1.5, 0], [1.5, 2.5]], [[15, 0], [0, 24]]),  # (1 + 2) / 2; (0 + 3, 1 + 4) / 2
        ("pivotal", [[1.25, 0], [0.75, 1.75]], [[12.5, 0], [0, 16]]),  # (1 + (2 + 1) / 2) / 2
        ("weighted", [[1.5, 0], [1.2, 2.1]], [[15, 0], [0, 20]]),  # (1 + 1.0 * 2) / 2; (1 + 0.8 * 4) / 2
    ],
)
def test_four_keys_worked_by_hand(rule: Rule, keys: list[list[float]], values: list[list[float]]) -> None:
    target, cosine = nearest(FOUR, Parting.of(FOUR, ENDS))
    assert target.tolist() == [[[0, 1]]]
    torch.testing.assert_close(cosine, torch.tensor([[[1.0, 0.8]]]))
    got = into_nearest(FOUR, ENDS, rule)
    torch.testing.assert_close(got, tuple(torch.tensor([[x]], dtype=torch.float32) for x in (keys, values)))
    alone = into_nearest(FOUR, ENDS, rule, only_alike=True)  # 0.8 is below the mean of 1.0 and 0.8: it is dropped
    torch.testing.assert_close(alone[0], torch.tensor([[[keys[0], [0.0, 1.0]]]], dtype=torch.float32))
    torch.testing.assert_close(alone[1], torch.tensor([[[values[0], [0.0, 8.0]]]], dtype=torch.float32))


@pytest.mark.parametrize("rule", RULES)
def test_what_equals_a_kept_entry_changes_nothing_and_neither_does_nothing(rule: Rule) -> None:
    a, b = [0.3, -0.7, 0.1], [0.9, 0.2, 0.4]
    held = held_by_hand([a, a, b, a], [b, b, a, b])
    keys, values = into_nearest(held, torch.tensor([[[0, 2]]]), rule)
    if rule == "weighted":  # a cosine of 1 is one up to rounding
        torch.testing.assert_close((keys, values), (held.keys[:, :, [0, 2]], held.values[:, :, [0, 2]]))
    else:
        assert torch.equal(keys, held.keys[:, :, [0, 2]])
        assert torch.equal(values, held.values[:, :, [0, 2]])
    assert torch.equal(keys[:, :, 1], held.keys[:, :, 2])  # into this one nothing went


def reference(held: Held, kept: list[list[list[int]]], rule: Rule, x: Tensor) -> list[list[np.ndarray]]:
    """The table of ``folded``, one entry after the other."""
    keys, rows = held.keys.double().numpy(), x.double().numpy()
    out = []
    for b, heads in enumerate(kept):
        out.append([])
        real = [j for j in range(keys.shape[2]) if held.positions is None or int(held.places()[b, 0, j]) >= 0]
        for h, stays in enumerate(heads):
            into: dict[int, list[np.ndarray]] = {c: [] for c in stays}
            for e in (j for j in real if j not in stays):
                cosines = [
                    keys[b, h, e] @ keys[b, h, c] / np.linalg.norm(keys[b, h, e]) / np.linalg.norm(keys[b, h, c]) for c in stays
                ]
                c = stays[int(np.argmax(cosines))]
                e_row, c_row = rows[b, h, e], rows[b, h, c]
                into[c].append({"averaged": e_row, "pivotal": (e_row + c_row) / 2, "weighted": max(cosines) * e_row}[rule])
            out[b].append(np.array([(rows[b, h, c] + sum(into[c])) / (len(into[c]) + 1) for c in stays]))
    return out


@pytest.mark.parametrize("rule", RULES)
def test_rows_and_heads_of_different_lengths_equal_loops(rule: Rule) -> None:
    """A padded row, heads that keep differently many entries, padding full of not-a-numbers."""
    held = random_held((0, 5))
    kept = [[[0, 3, 4, 9], [2, 11]], [[6, 7], [5, 8]]]
    ragged = [torch.tensor([[0, 3, 4, 9], [-1, -1, 6, 7]]), torch.tensor([[2, 11], [5, 8]])]
    expected = [reference(held, kept, rule, x) for x in (held.keys, held.values)]
    for got, wanted in zip(into_nearest(held, ragged, rule), expected, strict=True):
        for b in range(2):
            for h in range(2):
                np.testing.assert_allclose(got[b, h, 4 - len(kept[b][h]) :].numpy(), wanted[b][h], rtol=1e-5, atol=1e-6)
    filled = torch.tensor([[[2, 3, 4, 9]] * 2, [[3, 4, 6, 7]] * 2])  # as an eviction fills up a row: with its padding
    got = into_nearest(held, filled, rule)[0][1, :, 2:]
    np.testing.assert_allclose(got.numpy(), reference(held, [[[2]] * 2, [[6, 7]] * 2], rule, held.keys)[1], rtol=1e-5, atol=1e-6)


def test_blocks_of_rows_and_the_filter() -> None:
    held = random_held((0, 5), length=30)
    parting = Parting.of(held, torch.tensor([[[4, 9, 17]] * 2, [[9, 17, 20]] * 2]))
    assert [int(n) for n in parting.leaves.sum(-1)[:, 0]] == [27, 22]
    target, cosine = nearest(held, parting)
    in_blocks, blockwise = nearest(held, parting, rows=4)
    assert torch.equal(target, in_blocks)
    torch.testing.assert_close(cosine[target >= 0], blockwise[target >= 0])
    left = alike(target, cosine)
    for b in range(2):
        best = cosine[b][target[b] >= 0].numpy()
        assert sorted(cosine[b][left[b] >= 0].tolist()) == sorted(best[best >= best.mean()].tolist())
    unchanged = folded(held.keys, parting, torch.full_like(target, -1), "averaged", cosine)
    assert torch.equal(unchanged[0], held.keys[0][:, [4, 9, 17]])


def test_the_next_entries_worked_by_hand() -> None:
    held = held_by_hand([[0.0]] * 6, [[1.0], [10.0], [100.0], [1000.0], [10000.0], [7.0]])
    following = Following.of(Parting.of(held, torch.tensor([[[1, 3, 4]]])), 2)
    assert following.parting.leaving.tolist() == [[[0, 2, 5]]]
    assert following.room.tolist() == [[[2, 2, 0]]]  # nothing stays behind the last one
    weight = torch.tensor([[[3.0, 1.0, 0.0, 5.0, 7.0, 2.0]]])
    assert following.ratio(weight).tolist() == [[[1.0, 0.0, 0.0]]]  # 3 / mean(1, 5); 0 / mean(5, 7)
    every = following.spread(held.values, torch.tensor([[[True, True, True]]]))
    assert every.flatten().tolist() == [10.5, 1050.5, 10050.0]  # halves of 1 to the first two, of 100 to the last two
    second = following.spread(held.values, torch.tensor([[[False, True, False]]]))
    assert second.flatten().tolist() == [10.0, 1050.0, 10050.0]


def test_draws_follow_from_the_position_alone() -> None:
    def split_mix(*keys: int) -> float:
        state = 0
        for key in keys:
            z = (state + key + 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            state = z ^ z >> 31
        return state % 2**53 / 2**53

    draws = position_draws(torch.arange(400).expand(1, 2, -1), seed=2**63 - 1, layer=3)
    assert draws[0].tolist() == [[split_mix(2**63 - 1, 3, head, p) for p in range(400)] for head in range(2)]
    assert abs(float(draws.mean()) - 0.5) < 0.05
    shifted = position_draws(torch.arange(5, 9).expand(3, 2, -1), seed=2**63 - 1, layer=3)
    assert torch.equal(shifted, draws[:, :, 5:9].expand(3, -1, -1))


def test_a_packed_cache_refuses() -> None:
    layer: KVLayer = prefilled(make_session(), prompt(20)).cache.layers[0]
    keys, values = (x.clone() for x in layer.group.store.read())
    with torch.inference_mode():
        layer.write(values, keys)
    assert torch.equal(layer.held().keys, values)
    layer.group.store = QuantizedStore(keys, values, 8, 8, 0)
    with pytest.raises(SpecError, match=r"QuantizedStore.*when = prefill"):
        layer.write(keys, values)
