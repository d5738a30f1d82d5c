"""SimLayerKV against attention maps of the library's eager implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.methods.driving import attached, library_model, make_session, prefill, prompt
from tests.methods.test_budgets import call_with, positions
from workers.policies.kv.simlayerkv import SimLayerKV

KNOBS = {"recent": 0.25, "sinks": 2, "window": 5}
PROMPTS = [prompt(length, seed) for length, seed in ((40, 0), (40, 5), (40, 1), (31, 2), (31, 3), (20, 4))]


def stays(length: int) -> list[int]:
    """What a lazy layer keeps of a prompt."""
    newest = round(0.25 * length)
    return [0, 1, *range(length - newest, length)]


def library_shares(ids: list[int], window: int = 5) -> list[float]:
    """Per layer the attention that the last queries pay to what would stay, mean over query heads."""
    with torch.inference_mode():
        maps = library_model(tiny.llama_folder(), "eager")(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    return [float(m[0, :, -window:].double().numpy()[..., stays(len(ids))].sum(-1).mean()) for m in maps]


@pytest.mark.parametrize("chunk", [None, 7, 3])
def test_layers_over_the_threshold_are_cut_back(chunk: int | None) -> None:
    session, ids = make_session(chunk_size=chunk), PROMPTS[0]
    shares, whole = library_shares(ids), list(range(40))
    for threshold in (min(shares) - 1e-4, (shares[0] + shares[1]) / 2, max(shares) + 1e-4):
        with attached(session, SimLayerKV(threshold=threshold, lazy_layers=0, **KNOBS)):
            kept = positions(prefill(session, ids))
        assert kept == [[stays(40) if share > threshold else whole] * 2 for share in shares]
    assert session.acted["simlayerkv"] == 3 * (40 - 12)  # two layers, one, none; mean over heads


def test_each_row_of_a_batch_has_its_own_lazy_layers() -> None:
    session, shares = make_session(), [library_shares(ids) for ids in PROMPTS]
    threshold = float(np.median(shares))
    with attached(session, SimLayerKV(threshold=threshold, lazy_layers=0, **KNOBS)):
        state = prefill(session, *PROMPTS)
    lazy = set()
    for row, (ids, of_row) in enumerate(zip(PROMPTS, shares, strict=True)):
        for layer, share in enumerate(of_row):
            lazy.add((layer, share > threshold))
            held = state.cache.layers[layer].held().places().expand(len(PROMPTS), 2, -1)[row]
            expected = stays(len(ids)) if share > threshold else list(range(len(ids)))
            assert [[p for p in head if p >= 0] for head in held.tolist()] == [expected] * 2
    assert len(lazy) == 4  # both kinds in both layers


def test_the_laziest_are_chosen_as_worked_by_hand() -> None:
    shares = torch.tensor([[0.5, 0.95], [0.7, 0.92], [0.6, 0.1]])  # [layers, B]
    assert SimLayerKV(threshold=0.9, lazy_layers=0).lazy(shares).tolist() == [[False, True], [False, True], [False, False]]
    assert SimLayerKV(threshold=0.9, lazy_layers=1).lazy(shares).tolist() == [[False, True], [True, True], [False, False]]
    assert SimLayerKV(threshold=1.0, lazy_layers=2).lazy(shares).tolist() == [[False, True], [True, True], [True, False]]


def test_shares_as_worked_by_hand() -> None:
    """Zero queries attend evenly: the last two see 7 and 8 entries, a sink and the newest 2 (of 8) are asked for."""
    call = call_with(8, 1, [8, 4])
    policy = SimLayerKV(sinks=1, recent=0.25, window=2)
    # in the row of 4 tokens the newest is 1 of them; its queries see 3 and 4 entries
    torch.testing.assert_close(policy.share(call), torch.tensor([(2 / 7 + 3 / 8) / 2, (1 / 3 + 2 / 4) / 2]))
    assert policy.stays(call.cache, call.forward)[:, 0].long().tolist() == [[1, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 0, 0, 1]]


def test_no_lazy_layer_is_told() -> None:
    session, policy = make_session(), SimLayerKV(lazy_layers=0)
    with attached(session, policy):
        prefill(session, PROMPTS[0])
    assert "simlayerkv" not in session.acted
    assert "no layer paid more than threshold = 0.9" in policy.why_idle(session)
    assert "newest 25%" in policy.why_idle(session)
