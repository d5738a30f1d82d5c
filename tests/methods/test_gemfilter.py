"""GemFilter against the library: its own first layers choose, and its own forward reads what is left as a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests import tiny, tiny_vision
from tests.methods.driving import (
    attached,
    generate,
    library_model,
    make_session,
    prefill,
    prompt,
    run_items,
    seeing_session,
    tokens,
)
from tests.methods.seeing import CLOSE, Given, given, greedy, one, prefilled
from tests.tiny_states import FOLDERS
from workers.families.batches import make_batch
from workers.mechanisms.last_query import most_asked_for
from workers.policies.tokens.gemfilter import GemFilter
from workers.policies.tokens.random_visual import RandomVisual

FOUR = {"name": "llama4", "num_hidden_layers": 4}  # layers 0 and 1 read everything at depth 0.5
KNOBS = {"keep": 0.25, "depth": 0.5}


def chosen(ids: Sequence[int], count: int) -> list[int]:
    """Places of the ``count`` best tokens by the library's own maps of layer 1, and of the last one."""
    model = library_model(tiny.llama_folder(**FOUR), "eager")
    seen: dict[str, torch.Tensor] = {}
    block, cache = model.model.layers[1].self_attn, DynamicCache()
    handle = block.q_proj.register_forward_hook(lambda m, a, out: seen.update(query=out))
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
        cos, sin = model.model.rotary_emb(seen["query"], torch.arange(len(ids))[None])
    handle.remove()
    q = seen["query"][0, -1].view(4, 2, 8).double()  # heads, halves of the width
    c, s = cos[0, -1, :8].double(), sin[0, -1, :8].double()
    q = torch.cat((q[:, 0] * c - q[:, 1] * s, q[:, 1] * c + q[:, 0] * s), 1)
    logits = torch.einsum("hd,hld->l", q, cache.layers[1].keys[0].double().repeat_interleave(2, 0))
    smooth = np.convolve(logits.numpy(), np.ones(5), "same")[:-1]
    return sorted([*np.argsort(-smooth, kind="stable")[:count].tolist(), len(ids) - 1])


@pytest.mark.parametrize("chunk", [None, 7])
def test_the_model_reads_what_an_early_layer_chose_as_if_it_were_the_prompt(chunk: int | None) -> None:
    session, ids = make_session(tiny.llama_folder(**FOUR), chunk_size=chunk), prompt(40)
    places = chosen(ids, 10)
    short = [ids[i] for i in places]
    expected = generate(session, [short], new=6)
    with torch.inference_mode():
        logits = library_model(tiny.llama_folder(**FOUR), "sdpa")(input_ids=torch.tensor([short])).logits[:, -1]
    with GemFilter(**KNOBS).attach(session):
        state = prefill(session, ids)
        trace = generate(session, [ids], new=6)
    torch.testing.assert_close(state.logits, logits, rtol=1e-5, atol=1e-5)
    assert tokens(trace) == tokens(expected)
    assert (state.lengths, state.next_position.tolist(), state.cache.seen) == ([11], [[11]], 11)
    for name in ("prefill_kv_bytes", "kv_bytes", "kept_prompt_tokens", "cached_tokens"):
        assert trace.counts[name] == expected.counts[name], name
    assert trace.kept == [[[1.0 if i in places else 0.0 for i in range(40)]] * 4]
    assert session.acted["gemfilter"] == 2 * 29


def test_rows_of_a_padded_batch_equal_single_runs() -> None:
    session, rows = make_session(tiny.llama_folder(**FOUR)), [prompt(40), prompt(39, seed=2), prompt(23, seed=1)]
    with GemFilter(keep=0.4, depth=0.5).attach(session):
        together = generate(session, rows, new=8)
        alone = [generate(session, [row], new=8) for row in rows]
    assert tokens(together) == [tokens(x)[0] for x in alone]
    assert together.kept == [x.kept[0] for x in alone]


@pytest.mark.parametrize("folder", [tiny.gpt2_folder, tiny.gemma3_folder, FOLDERS["bamba"]], ids=["gpt2", "gemma3", "bamba"])
def test_other_blocks_choose_as_well(folder: Callable[[], Path]) -> None:
    """Learnt positions, sliding windows, and a first layer with a running state only: the next one chooses."""
    session = make_session(folder())
    with GemFilter(**KNOBS).attach(session):
        assert generate(session, [prompt(40)], new=3).counts["kept_prompt_tokens"] == 11
    assert session.acted["gemfilter"] == 29


def test_a_share_that_leaves_everything_changes_nothing() -> None:
    session, ids = make_session(), prompt(40)
    expected = prefill(session, ids).logits
    with GemFilter(keep=0.98).attach(session):
        assert torch.equal(prefill(session, ids).logits, expected)
    assert "gemfilter" not in session.acted
    assert not session.prompt_filters


def test_the_choice_and_the_shorter_batch_by_hand() -> None:
    scores = torch.tensor([[0.0, 6.0, 0.0, 1.0, 0.0, 9.0], [99.0, 99.0, 2.0, 0.0, 1.0, 3.0]])
    batch = make_batch([[10, 11, 12, 13, 14, 15], [20, 21, 22, 23]], 0, torch.device("cpu"))
    real, counts = batch.positions >= 0, torch.tensor([3, 1])
    # neighbours together: 6 6 7 1 10 and, behind padding, 2 3 4; without what the last token asks of itself 6 6 7 1 1
    for own, expected in ((True, [[0, 2, 4, 5], [0, 1, 4, 5]]), (False, [[0, 1, 2, 5], [0, 1, 3, 5]])):
        index = most_asked_for(scores, real, counts, 3, own)
        assert index is not None
        assert index.tolist() == expected
    short = batch.only(index)
    assert short.ids.tolist() == [[10, 11, 12, 15], [0, 0, 21, 23]]
    assert short.positions.tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    assert (short.lengths, short.origin) == ([4, 2], [[0, 1, 2, 5], [1, 3]])
    again = short.only(torch.tensor([[0, 3], [2, 3]]))
    assert (again.origin, again.padded) == ([[0, 5], [1, 3]], False)


@pytest.mark.parametrize("turning", [False, True], ids=["llava", "qwen2_5_vl"])
def test_image_tokens_are_chosen_like_words(turning: bool) -> None:
    """Behind a selector that dropped half of them; what is left equals the library on the embeddings that were chosen."""
    folder = tiny_vision.qwen2_5_vl_folder() if turning else tiny_vision.llava_folder(4)
    session, item, half = seeing_session(folder), one(96, 96), RandomVisual(keep=0.5)
    with attached(session, half):
        prefilled(session, item)
    entered = session.seen[0].entered
    with attached(session, half, GemFilter(**KNOBS)):
        state = prefilled(session, item)
        trace = run_items(session, [item], 5)
    what = given(folder, item).without(entered)
    columns = [j for j, place in enumerate(places_entered(what, given(folder, item), entered)) if place in set(state.origin[0])]
    left = torch.tensor(columns)
    assert len(left) == round(0.25 * len(what.ids)) + 1
    behind = int(what.positions.max()) + 1 if turning else len(left)
    positions = what.positions[:, left] if turning else torch.arange(len(left))
    short = Given(what.model, what.ids[left], what.inputs, what.embeds[left], positions)
    logits, following = greedy(short, 5, first_position=behind)
    torch.testing.assert_close(state.logits[0], logits, **CLOSE)
    assert tokens(trace) == [following]
    record, layers = trace.seen[0], len(state.cache.layers)
    places = given(folder, item).places.tolist()
    assert record.share == [
        0.0 if t not in entered else 1.0 if place in state.origin[0] else 2 / layers if layers == 4 else 1 / layers
        for t, place in enumerate(places)
    ]


def places_entered(what: Given, whole: Given, entered: Sequence[int]) -> list[int]:
    """Where the tokens that entered stood in the whole prompt."""
    dropped = {p for t, p in enumerate(whole.places.tolist()) if t not in set(entered)}
    found = [i for i in range(len(whole.ids)) if i not in dropped]
    assert len(found) == len(what.ids)
    return found
