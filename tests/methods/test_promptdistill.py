"""PromptDistill against an own layer loop over the library's modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache

from studio_state.errors import Unavailable
from tests import tiny, tiny_vision
from tests.methods.driving import (
    forced,
    generate,
    image_item,
    library_model,
    load,
    make_session,
    prefill,
    prompt,
    run_items,
    seeing_session,
    tokens,
)
from workers.mechanisms.ranking import best_of_real
from workers.mechanisms.selection_stages import evenly, held_share
from workers.policies.tokens.promptdistill import PromptDistill
from workers.session import Session

FOUR = {"name": "llama4", "num_hidden_layers": 4}  # layers 0 and 1 read everything at depth 0.5


def deep_session(**spec: object) -> Session:
    return make_session(tiny.llama_folder(**FOUR), **spec)


def bits(session: Session, *prompts: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [layer.group.store.read() for layer in prefill(session, *prompts).cache.layers]


@pytest.mark.parametrize("keep", [1.0, 0.98])
def test_keeping_all_but_the_last_token_changes_nothing(keep: float) -> None:
    """k >= L - 1: the same logits bit for bit."""
    session, ids, later = deep_session(), prompt(40), prompt(6, seed=1)
    expected = forced(session, ids, later)
    with PromptDistill(keep=keep).attach(session):
        assert torch.equal(forced(session, ids, later), expected)
    assert "promptdistill" not in session.acted


def test_early_caches_equal_the_baselines_bit_for_bit() -> None:
    session, ids = deep_session(), prompt(40)
    base = bits(session, ids)
    with PromptDistill(keep=0.25, depth=0.5).attach(session):
        state = prefill(session, ids)
    got = [layer.group.store.read() for layer in state.cache.layers]
    assert all(torch.equal(a, b) for i in (0, 1) for a, b in zip(base[i], got[i], strict=True))
    assert [layer.stored for layer in state.cache.layers] == [40, 40, 11, 11]  # round(0.25 * 40) and the last
    assert state.cache.seen == 40


def selected(session: Session, ids: list[int], k: int, layer: int, kernel: int) -> list[int]:
    """The selection recomputed in numpy from the baseline's own cache and the library's query projection."""
    cache = DynamicCache()
    model = library_model(tiny.llama_folder(**FOUR), "eager")
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids]), past_key_values=cache, output_hidden_states=True).hidden_states[layer]
        block = model.model.layers[layer]
        query = block.self_attn.q_proj(block.input_layernorm(hidden))[0, -1].view(session.info.heads, -1)
        cos, sin = (x[0, -1].numpy() for x in model.model.rotary_emb(hidden, torch.arange(len(ids))[None]))
    q = query.numpy()
    half = q.shape[1] // 2
    q = q * cos + np.concatenate((-q[:, half:], q[:, :half]), 1) * sin
    keys = np.repeat(cache.layers[layer].keys[0].numpy(), session.info.heads // session.info.kv_heads, 0)
    scores = np.einsum("hd,hld->hl", q, keys).mean(0) / np.sqrt(q.shape[1])
    scores[-1] = 0
    padded = np.pad(scores, kernel // 2)
    smooth = np.array([padded[i : i + kernel].mean() for i in range(len(ids))])
    return sorted([*np.argsort(-smooth[:-1], kind="stable")[:k].tolist(), len(ids) - 1])


@pytest.mark.parametrize("kernel", [1, 5])
def test_selection_and_later_layers_equal_an_own_loop(kernel: int) -> None:
    """The library's modules called by hand on the gathered hidden states give the same logits and caches."""
    session, ids = deep_session(), prompt(40)
    index = torch.tensor(selected(session, ids, 10, layer=1, kernel=kernel))
    with PromptDistill(keep=0.25, depth=0.5, kernel=kernel).attach(session):
        state = prefill(session, ids)
    assert state.cache.layers[2].group.positions[0, 0].tolist() == index.tolist()

    library = library_model(tiny.llama_folder(**FOUR), "sdpa")
    model, cache, positions = library.model, DynamicCache(), torch.arange(40)[None]
    with torch.inference_mode():
        x = model.embed_tokens(torch.tensor([ids]))
        rope = model.rotary_emb(x, positions)
        for number, block in enumerate(model.layers):
            x = block(x, attention_mask=None, position_embeddings=rope, past_key_values=cache)
            if number == 1:
                x, rope = x[:, index], tuple(r[:, index] for r in rope)
        logits = library.lm_head(model.norm(x))[:, -1]
    torch.testing.assert_close(state.logits, logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(state.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.group.store.read()[0], theirs.keys, rtol=1e-5, atol=1e-5)


def test_a_planted_repetition_is_found() -> None:
    """Copy heads set by hand: layer 0 writes nothing, so layer 1's keys and queries are the tokens' own embeddings."""
    session = make_session(
        tiny.llama_folder("llama-planted", num_hidden_layers=3, rope_parameters={"rope_type": "default", "rope_theta": 1e30})
    )
    ids = prompt(60, seed=4)
    needle = 23
    ids[-1] = ids[needle]
    block = session.model.model.layers[1].self_attn
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            session.model.model.layers[0].get_submodule(name).weight.zero_()
        block.q_proj.weight.copy_(block.k_proj.weight.view(2, 16, 64).repeat_interleave(2, 0).reshape(64, 64))  # query = key
    try:
        with PromptDistill(keep=0.1, depth=0.67, kernel=1).attach(session):
            state = prefill(session, ids)
    finally:
        session.model.load_state_dict(before, strict=False)
    assert needle in state.cache.layers[2].group.positions[0, 0].tolist()


def test_truncation_leaves_the_same_positions_everywhere() -> None:
    session, ids = deep_session(), prompt(40)
    base = bits(session, ids)
    with PromptDistill(keep=0.25, depth=0.5, truncate=True).attach(session):
        state = prefill(session, ids)
        trace = generate(session, [ids], new=4)
    positions = [layer.group.positions[0, 0].tolist() for layer in state.cache.layers]
    assert positions == [positions[3]] * 4
    assert len(positions[0]) == 11
    for i in (0, 1):
        assert torch.equal(state.cache.layers[i].group.store.read()[0], base[i][0][:, :, positions[0]])
    assert trace.counts["prefill_kv_bytes"] == 4 * 11 * 2 * 2 * 16 * 4
    assert len(tokens(trace)[0]) == 4


def test_rows_of_a_padded_batch_equal_single_runs() -> None:
    session, a, b = deep_session(), prompt(40), prompt(23, seed=1)
    with PromptDistill(keep=0.4, depth=0.5).attach(session):
        together = generate(session, [a, b], new=8)
        alone = [generate(session, [x], new=8) for x in (a, b)]
    assert tokens(together) == [tokens(x)[0] for x in alone]
    assert together.kept[1] == alone[1].kept[0]


def test_best_of_real_by_hand() -> None:
    scores = torch.tensor([[9.0, 1.0, 5.0, 3.0, 99.0], [7.0, 8.0, 1.0, 2.0, 99.0]])
    real = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert best_of_real(scores, real, torch.tensor([3, 2])).tolist() == [[0, 2, 4], [0, 3, 4]]


def test_no_trace_is_left() -> None:
    """Decoder layers are hooked during the prefill only, and not at all after a prefill that was interrupted."""
    session = deep_session()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in session.model.modules())

    def stop(call: object) -> None:
        during.append(hooks())
        if len(during) == 7:
            raise KeyboardInterrupt

    before, during = hooks(), []
    with PromptDistill(depth=0.5).attach(session), session.hooked(session.observers, stop):
        prefill(session, prompt(40))
        assert hooks() == before
        with pytest.raises(KeyboardInterrupt):
            prefill(session, prompt(40))
    assert [n - before for n in during] == [0, 2, 2, 2, 0, 2, 2]
    assert hooks() == before
    assert not session.observers


def test_other_blocks_narrow_as_well() -> None:
    """Qwen3 (normalised heads), Mistral, Gemma 3 (sliding windows, one rotary embedding a layer kind)."""
    for folder in (tiny.qwen3_folder(), tiny.mistral_folder(), tiny.gemma3_folder()):
        session = make_session(folder)
        assert load(folder) is session.model
        with PromptDistill(keep=0.25, depth=0.5).attach(session):
            state = prefill(session, prompt(40))
            generate(session, [prompt(40)], new=3)
        assert [layer.stored for layer in state.cache.layers] == [40, 11]


@pytest.mark.parametrize("folder", [tiny.gpt2_folder, tiny.bloom_folder])
def test_models_of_an_older_form_are_refused(folder: Callable[[], Path]) -> None:
    session = make_session(folder())
    with pytest.raises(Unavailable, match="all tokens go through all layers"):
        PromptDistill().attach(session)
    assert not session.observers


# -- several stages --------------------------------------------------------------------------


def rotated(x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
    half = x.shape[-1] // 2
    return x * rope[0][:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * rope[1][:, None]


def test_stages_equal_an_own_loop_that_gathers_again_and_again() -> None:
    """By hand: after layers 0, 1 and 2 some of what is left goes on; 20 of 40, 10 of 20, 4 of 10 tokens and the last."""
    session, ids = deep_session(), prompt(40)
    with PromptDistill(stages=3, depths="0.25, 0.5, 0.75", keeps="0.5, 0.25, 0.1").attach(session):
        state = prefill(session, ids)

    library = library_model(tiny.llama_folder(**FOUR), "sdpa")
    model, cache, left = library.model, DynamicCache(), torch.arange(40)
    with torch.inference_mode():
        x = model.embed_tokens(torch.tensor([ids]))
        rope = model.rotary_emb(x, left[None])
        for number, (block, count) in enumerate(zip(model.layers, (20, 10, 4, None), strict=True)):
            assert state.cache.layers[number].held().places()[0, 0].tolist() == left.tolist()
            normed = block.input_layernorm(x)
            x = block(x, attention_mask=None, position_embeddings=rope, past_key_values=cache)
            if count is None:
                break
            q, k = (
                rotated(p(normed).view(1, len(left), -1, 16).transpose(1, 2), rope)
                for p in (block.self_attn.q_proj, block.self_attn.k_proj)
            )
            scores = (q[0, :, -1:] @ k[0].repeat_interleave(2, 0).transpose(1, 2))[:, 0].sum(0)
            scores[-1] = 0
            smooth = np.convolve(scores.numpy(), np.ones(5), "same")[:-1]
            chosen = torch.tensor(sorted([*np.argsort(-smooth)[:count].tolist(), len(left) - 1]))
            x, rope, left = x[:, chosen], tuple(r[:, chosen] for r in rope), left[chosen]
        logits = library.lm_head(model.norm(x))[:, -1]
    torch.testing.assert_close(state.logits, logits, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(state.cache.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.group.store.read()[0], theirs.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("cutting", "lengths"), [(1, [21, 21, 11, 5]), (2, [11, 11, 11, 5]), (0, [5, 5, 5, 5])])
def test_the_first_stages_truncate_what_lies_before_them(cutting: int, lengths: list[int]) -> None:
    session, knobs = deep_session(), {"stages": 3, "depths": "0.25, 0.5, 0.75", "keeps": "0.5, 0.25, 0.1"}
    with PromptDistill(**knobs).attach(session):
        whole = prefill(session, prompt(40))
    policy = PromptDistill(**knobs, truncate=True, truncate_stages=cutting)
    with policy.attach(session):
        state = prefill(session, prompt(40))
    assert [layer.stored for layer in whole.cache.layers] == [40, 21, 11, 5]
    assert [layer.stored for layer in state.cache.layers] == lengths
    places = [layer.held().places()[0, 0].tolist() for layer in whole.cache.layers]
    for layer, before in zip(state.cache.layers, whole.cache.layers, strict=True):
        (kept,) = (p for p in places if len(p) == layer.stored)  # a later stage chose among what this one had left
        assert layer.held().places()[0, 0].tolist() == kept
        held = before.held().places()[0, 0].tolist()
        assert torch.equal(layer.held().keys, before.held().keys[:, :, [held.index(p) for p in kept]])
    assert policy.kv_factor() == pytest.approx(sum(x / 40 for x in lengths) / 4, abs=0.03)


def test_stages_of_padded_rows_equal_single_runs() -> None:
    """Lengths at which a rounded share of the whole would ask for more tokens than there is padding for."""
    session, rows = deep_session(), [prompt(n, seed=n) for n in (40, 39, 38, 22)]
    with PromptDistill(stages=3, depth=0.25, keep=0.13).attach(session):
        together = generate(session, rows, new=5)
        alone = [generate(session, [row], new=5) for row in rows]
    assert tokens(together) == [tokens(x)[0] for x in alone]
    assert together.kept == [x.kept[0] for x in alone]


def test_the_arithmetic_of_stages_by_hand() -> None:
    assert evenly(1, 0.25, 0.43) == ([0.43], [0.25])
    depths, shares = evenly(2, 0.25, 0.4)
    assert (depths, shares) == (pytest.approx([0.4, 0.7]), pytest.approx([0.5, 0.25]))
    assert held_share(depths, shares, cut=0) == pytest.approx(0.4 + 0.3 * 0.5 + 0.3 * 0.25)
    assert held_share(depths, shares, cut=1) == pytest.approx(0.7 * 0.5 + 0.3 * 0.25)
    assert PromptDistill(stages=3).selecting_layers(2) == {0: pytest.approx(0.25)}  # no room for more than one
    saved = PromptDistill.model_validate({"keep": 0.25, "depth": 0.43, "kernel": 5, "truncate": True})
    assert saved.selecting_layers(30) == {12: 0.25}
    assert saved.kv_factor() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "knobs",
    [
        {"stages": 2, "depths": "0.5"},
        {"depths": "0.5, 0.6"},
        {"stages": 2, "depths": "0.6, 0.5"},
        {"stages": 2, "depths": "0.5, 1.5"},
        {"stages": 2, "keeps": "0.2, 0.5"},
        {"stages": 2, "keeps": "0.5, 0"},
        {"stages": 2, "keeps": "0.5, nan"},
        {"stages": 2, "keeps": "half, third"},
    ],
)
def test_lists_that_do_not_fit_the_stages_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="one a stage, with commas between"):
        PromptDistill(**knobs)


def test_image_tokens_remember_how_deep_they_went() -> None:
    session = seeing_session(tiny_vision.llava_folder(4))
    with PromptDistill(stages=2, depths="0.25, 0.75", keeps="0.5, 0.2").attach(session):
        trace = run_items(session, [image_item()], 1)
    (record,), layers = trace.seen, np.array(trace.kept[0])  # [layers, tokens]
    places = (torch.tensor(trace.results[0].prompt_ids) == session.model.config.image_token_id).nonzero()[:, 0]
    assert record.share == layers[:, places].mean(0).tolist()
    assert set(record.share) == {0.25, 0.75, 1.0}
