"""Budgets of evictors: how layers and heads share them, and that bytes are freed to match, for every way of scoring."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from studio_state.errors import SpecError
from tests.methods.driving import attached, generate, make_session, prefill, prompt, repetitive_prompt
from workers.families.batches import State
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import KVLayer, StudioCache
from workers.mechanisms.eviction import Guarded, keep_best_of_all, mixed_budgets
from workers.mechanisms.evictor import Budgeted, Evictor
from workers.mechanisms.kv_store import gather_entries
from workers.mechanisms.layer_budgets import layer_shares
from workers.mechanisms.ranking import best_of_all_real
from workers.methods import Policy, discover
from workers.policies.kv.adakv import AdaKV
from workers.policies.kv.pyramidkv import PyramidKV
from workers.policies.kv.snapkv import SnapKV
from workers.policies.kv.streamingllm import StreamingLLM

BUDGETED = {name: cls for name, cls in discover().items() if issubclass(cls, Budgeted)}
EVICTORS = {name: cls for name, cls in BUDGETED.items() if issubclass(cls, Evictor)}
PROMPT = repetitive_prompt(200, period=40)


def lengths(state: State) -> list[list[int]]:
    """Per layer, per head: stored entries."""
    return [[g.store.length for g in layer.groups for _ in range(g.start, g.stop)] for layer in state.cache.layers]


def positions(state: State) -> list[list[list[int]]]:
    """Per layer, per head: the logical positions kept in the first row."""
    found = []
    for layer in state.cache.layers:
        places = layer.held().places().expand(-1, layer.heads, -1)[0]
        found.append([[int(p) for p in head if p >= 0] for head in places])
    return found


def after_prefill(policy: Policy, *prompts: list[int], **spec: int) -> State:
    session = make_session(**spec)
    with attached(session, policy):
        return prefill(session, *(prompts or (PROMPT,)))


# -- layers ----------------------------------------------------------------------------------


def test_layers_share_a_budget_as_worked_by_hand() -> None:
    assert layer_shares(0.2, 4) == [0.2] * 4
    np.testing.assert_allclose(layer_shares(0.2, 3, "pyramid", slope=20), [0.39, 0.2, 0.01])
    np.testing.assert_allclose(layer_shares(0.2, 3, "pyramid", slope=1), [0.2, 0.2, 0.2])
    np.testing.assert_allclose(layer_shares(0.8, 3, "pyramid", slope=20), [1.0, 0.8, 0.6])  # the first layer is full
    np.testing.assert_allclose(layer_shares(0.2, 3, "given", given="3, 2, 1"), [0.3, 0.2, 0.1])
    np.testing.assert_allclose(layer_shares(0.2, 3, "given", given="3, 1"), [0.3, 0.2, 0.1])  # a line between two points
    np.testing.assert_allclose(layer_shares(0.5, 3, "given", given="8, 1, 1"), [1.0, 0.25, 0.25])  # the rest goes to the others


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("rule", "given"), [("uniform", ""), ("pyramid", ""), ("given", "5, 1"), ("given", "1, 40, 1, 1")])
def test_layers_keep_the_budget_on_average(keep: float, rule: str, given: str) -> None:
    shares = layer_shares(keep, 30, rule, 20.0, given)  # type: ignore[arg-type]
    assert np.mean(shares) == pytest.approx(keep)
    assert max(shares) <= 1 + 1e-9
    assert min(shares) > 0


@pytest.mark.parametrize("given", ["", "1, two", "1, 0", "1, -2", "1,, 2", "inf"])
def test_relative_budgets_that_are_no_positive_numbers_are_refused(given: str) -> None:
    with pytest.raises(SpecError, match="positive numbers with commas"):
        layer_shares(0.5, 4, "given", given=given)
    with pytest.raises(ValidationError, match="positive numbers with commas"):
        SnapKV(layers="given", layer_shares=given)


# -- presets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "spelled"),
    [
        (PyramidKV(keep=0.3, window=8), SnapKV(keep=0.3, window=8, layers="pyramid")),
        (AdaKV(keep=0.3, window=8), SnapKV(keep=0.3, window=8, heads="adaptive")),
    ],
    ids=["pyramidkv", "adakv"],
)
def test_a_preset_keeps_what_its_long_spelling_keeps(preset: Policy, spelled: Policy) -> None:
    kept = positions(after_prefill(preset))
    assert kept == positions(after_prefill(spelled))
    assert kept != positions(after_prefill(SnapKV(keep=0.3, window=8)))


# -- heads -----------------------------------------------------------------------------------


def call_with(keys: int, heads: int, lengths: list[int]) -> AttentionCall:
    """An attention call on a cache with so many entries, the rows padded on the left."""
    b, cache, longest = len(lengths), StudioCache(1), max(lengths)
    places = torch.stack([torch.cat((torch.full((longest - n,), -1), torch.arange(n))) for n in lengths])
    layer: KVLayer = cache.layers[0]
    states = torch.randn(b, heads, keys, 4, generator=torch.Generator().manual_seed(0))
    layer.append(states, states, places, keys, padded=min(lengths) != longest)
    forward = Forward(cache, "prefill", places, ends_prefill=True, prompt_lengths=lengths, seen=keys)
    return AttentionCall(0, torch.zeros(b, heads, keys, 4), layer, forward, 0.5)


def test_heads_share_a_layers_budget_as_worked_by_hand() -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6, 0.5], [1.0, 2, 3, 0, 0.1]]])
    call = call_with(5, 2, [5])

    def kept(safeguard: float, recent: int = 0) -> list[list[int]]:
        found = keep_best_of_all(call, scores, [3], Guarded(recent=recent), safeguard)
        assert found is not None
        return [head[0].tolist() for head in found]

    assert kept(0.0) == [[0, 1, 2, 3], [1, 2]]  # the six best of ten; a head always keeps one
    assert kept(0.3) == [[0, 1, 2, 3], [1, 2]]  # 0.7 * 4 + 0.3 * 3 = 3.7 and 2.3: the odd one goes to the larger fraction
    assert kept(0.7) == [[0, 1, 2], [0, 1, 2]]  # 3.3 and 2.7
    assert kept(1.0) == [[0, 1, 2], [0, 1, 2]]  # equal budgets
    assert kept(0.0, recent=1) == [[0, 1, 2, 3, 4], [4]]
    assert kept(0.5, recent=1) == [[0, 1, 2, 4], [2, 4]]  # what always stays does not count as saved


@pytest.mark.parametrize(
    ("ranked", "room", "safeguard", "expected"),
    [
        ([7, 0, 2], [9, 9, 9], 0.0, [7, 0, 2]),
        ([7, 0, 2], [9, 9, 9], 1.0, [3, 3, 3]),
        ([7, 0, 2], [9, 9, 9], 0.5, [5, 2, 2]),  # 5, 1.5 and 2.5: of equal fractions the first
        ([7, 2, 0], [9, 2, 2], 0.5, [6, 2, 1]),  # 5, 2 and 1: what a short head cannot take goes to the others
    ],
)
def test_a_safeguard_mixes_the_ranking_with_equal_budgets(
    ranked: list[int], room: list[int], safeguard: float, expected: list[int]
) -> None:
    assert mixed_budgets(ranked, 3, room, safeguard) == expected


def test_rows_that_keep_less_in_a_head_are_filled_with_padding() -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6], [1.0, 2, 3, 0]], [[0.0, 3, 2, 1], [0.0, 9, 8, 7]]])
    call = call_with(4, 2, [4, 3])
    found = keep_best_of_all(call, scores, [2, 1], Guarded(), 0.0)
    assert found is not None
    assert [head.tolist() for head in found] == [[[0, 1, 2], [-1, -1, 1]], [[2], [1]]]
    call.cache.keep(found)
    assert positions_of(call.cache, 0) == [[0, 1, 2], [2]]
    assert positions_of(call.cache, 1) == [[0], [0]]  # the second row's first token stands behind one of padding


def positions_of(layer: KVLayer, row: int) -> list[list[int]]:
    return [[int(p) for p in g.logical(2, torch.device("cpu"))[row, 0] if p >= 0] for g in layer.groups]


@pytest.mark.parametrize("name", EVICTORS)
def test_adaptive_heads_free_what_equal_heads_free(name: str) -> None:
    uniform, adaptive = (after_prefill(EVICTORS[name](keep=0.4, heads=heads)) for heads in ("uniform", "adaptive"))
    assert adaptive.cache.nbytes() == uniform.cache.nbytes()
    for equal, differing in zip(lengths(uniform), lengths(adaptive), strict=True):
        assert sum(equal) == sum(differing)


@pytest.mark.parametrize("name", EVICTORS)
def test_a_full_safeguard_is_equal_heads(name: str) -> None:
    uniform, adaptive = EVICTORS[name](keep=0.4, heads="uniform"), EVICTORS[name](keep=0.4, heads="adaptive", safeguard=1.0)
    assert positions(after_prefill(uniform)) == positions(after_prefill(adaptive))


# -- every way of scoring --------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["uniform", "pyramid", "given"])
@pytest.mark.parametrize("name", BUDGETED)
def test_freed_bytes_match_the_budget(name: str, layers: str) -> None:
    whole = after_prefill(StreamingLLM(keep=1.0)).cache.nbytes()
    for keep in (0.2, 0.5):
        got = after_prefill(BUDGETED[name](keep=keep, layers=layers)).cache
        guarded = 36 / len(PROMPT) if layers != "uniform" and name == "lagkv" else 0.0  # it never keeps less than that
        assert keep - 0.02 <= got.nbytes() / whole <= keep + 0.02 + guarded
        assert sum(g.store.length * g.positions.shape[1] for layer in got.layers for g in layer.groups if g.positions is not None)


@pytest.mark.parametrize("heads", ["uniform", "adaptive"])
@pytest.mark.parametrize("name", EVICTORS)
def test_while_decoding_the_cache_stays_within_budget(name: str, heads: str) -> None:
    session, every = make_session(), 4
    with attached(session, EVICTORS[name](keep=0.4, when="both", every=every, heads=heads, layers="uniform")):
        trace = generate(session, [PROMPT, PROMPT[:150]], new=10)
    most = 0.4 * len(PROMPT) + every
    assert trace.counts["kept_prompt_tokens"] <= most * (1 if heads == "uniform" else 2)  # as long as its longest row
    assert trace.counts["cached_tokens"] <= most * (1 if heads == "uniform" else 2)
    with attached(session, EVICTORS[name](keep=0.4, when="decode", every=every, heads=heads, layers="uniform")):
        trace = generate(session, [PROMPT], new=10)
    assert trace.counts["kept_prompt_tokens"] == len(PROMPT)
    assert trace.counts["cached_tokens"] <= most


@pytest.mark.parametrize("name", BUDGETED)
def test_between_chunks_memory_is_bounded(name: str) -> None:
    most: list[float] = []

    def look(call: AttentionCall) -> None:
        most.append(call.cache.stored)

    equal = {k: "uniform" for k in ("layers", "heads") if k in BUDGETED[name].model_fields}
    session = make_session(chunk_size=20)
    with session.hooked(session.observers, look), attached(session, BUDGETED[name](keep=0.4, between_chunks=True, **equal)):
        state = prefill(session, PROMPT)
    assert max(most) <= 0.4 * len(PROMPT) + 20
    assert all(n == round(0.4 * len(PROMPT)) for layer in lengths(state) for n in layer)


def test_between_chunks_scores_come_from_what_is_left() -> None:
    """Chunk by chunk by hand: the window votes over the entries that are still there."""
    policy, session = SnapKV(keep=0.2, window=4, kernel=1, between_chunks=True), make_session(chunk_size=10)
    votes: list[Tensor] = []

    def look(call: AttentionCall) -> None:
        if call.layer == 0:
            votes.append(call.held.places().expand(1, call.cache.heads, -1)[0, 0].clone())

    with session.hooked(session.observers, look), attached(session, policy):
        prefill(session, prompt(40))
    assert [len(v) for v in votes] == [10, 18, 18, 18]  # 8 kept and 10 new, from the second chunk on
    assert all(set(v[:8].tolist()) <= set(range(10 * i)) for i, v in enumerate(votes) if i)


@pytest.mark.parametrize("count", [1, 18, 19])
def test_the_best_of_all_entries_is_what_sorting_says(count: int) -> None:
    scores = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    wanted = scores.argsort(-1, descending=True)[..., :count].sort(-1).values
    assert torch.equal(best_of_all_real(scores, count), wanted)  # 19: a single one leaves


def test_one_entry_leaves_by_hand() -> None:
    scores = torch.tensor([[[3.0, 1.0, 2.0], [0.0, 5.0, float("inf")], [2.0, 1.0, 0.5]]])
    assert best_of_all_real(scores, 2).tolist() == [[[0, 2], [1, 2], [0, 1]]]


@pytest.mark.parametrize(
    ("batch", "shown", "heads"),
    [(1, slice(None), slice(None)), (1, slice(0, 6), slice(None)), (1, slice(2, 7), slice(1, 3)), (2, slice(1, 8), slice(0, 1))],
    ids=["whole", "room behind", "window of some heads", "batch"],
)
def test_entries_are_gathered_from_any_window_of_a_store(batch: int, shown: slice, heads: slice) -> None:
    x = torch.randn(batch, 3, 9, 4)[:, heads, shown]
    index = torch.rand(batch, x.shape[1], x.shape[2]).argsort(-1)[..., :4]
    rows = [torch.stack([x[b, h, i] for i in index[b, h]]) for b in range(batch) for h in range(x.shape[1])]
    assert torch.equal(gather_entries(x, index), torch.stack(rows).view(batch, -1, 4, 4))
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)  # rows that do not stand in one piece
    assert torch.equal(gather_entries(turned, index), gather_entries(x, index))
