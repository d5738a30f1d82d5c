"""Layer skipping against a model that was built without these layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny, tiny_vision
from tests.methods import encoders, seeing
from tests.methods.driving import (
    attached,
    forced,
    generate,
    image_item,
    info_of,
    library_model,
    make_session,
    prefill,
    prompt,
    repetitive_prompt,
    run_items,
    seeing_session,
    tokens,
)
from workers.families.comparing import kept_shares
from workers.methods import catalogue, effective
from workers.policies.depth.layer_skip import LayerSkip
from workers.session import Session

LAYERS = 4
PER_TOKEN = 2 * 2 * 16 * 4  # (K, V) x KV heads x head width x float32, of one layer
PROMPT = repetitive_prompt(96)
RUNS = [  # knobs and the layers that they leave out
    ({}, [2]),  # start = 0.6
    ({"start": 0.0}, [0]),
    ({"start": 0.5}, [2]),
    ({"start": 0.25, "count": 2}, [1, 2]),
    ({"start": 1.0}, [3]),
    ({"start": 0.9, "count": 3}, [1, 2, 3]),  # begins earlier, so that three fit
    ({"start": 0.0, "count": 3}, [0, 1, 2]),
]
every_run = pytest.mark.parametrize(("knobs", "out"), RUNS, ids=[str(out) for _, out in RUNS])


def without(model: Any, layers: Any, out: Sequence[int]) -> Any:
    """The model with these of its decoder layers taken out for good; ``layers`` is a function from model to list."""
    model = copy.deepcopy(model)
    found = layers(model)
    for i in sorted(out, reverse=True):
        del found[i]
    for i, layer in enumerate(found):
        for attention in (getattr(layer, "self_attn", None), getattr(layer, "attn", None)):
            if attention is not None:
                attention.layer_idx = i
    model.config.get_text_config().num_hidden_layers = len(found)
    return model


def llama(**spec: Any) -> Session:
    return make_session(tiny.llama_folder("llama-4", num_hidden_layers=LAYERS), **spec)


def shortened(session: Session, out: Sequence[int]) -> Session:
    """A session on the model without these layers."""
    model = without(session.model, lambda m: m.model.layers, out)
    info = session.info.model_copy(update={"layers": LAYERS - len(out)})
    return replace(session, model=model, info=info, built={}, acted={}, counts={})


@every_run
def test_equals_the_librarys_model_without_these_layers(knobs: dict[str, Any], out: list[int]) -> None:
    session = llama()
    with attached(session, LayerSkip(**knobs)):
        trace = generate(session, [PROMPT], 12)
        state = prefill(session, PROMPT)
    model = without(library_model(tiny.llama_folder("llama-4", num_hidden_layers=LAYERS), "sdpa"), lambda m: m.model.layers, out)
    ids = torch.tensor([PROMPT])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(PROMPT) :]
    assert tokens(trace) == [expected.tolist()]
    with torch.inference_mode():
        torch.testing.assert_close(state.logits, model(ids).logits[:, -1], rtol=1e-5, atol=1e-5)

    left = LAYERS - len(out)
    assert trace.counts["prefill_kv_bytes"] == left * len(PROMPT) * PER_TOKEN
    assert trace.counts["kv_bytes"] == left * (len(PROMPT) + 11) * PER_TOKEN
    assert trace.counts["kept_prompt_tokens"] == len(PROMPT) * left / LAYERS
    assert trace.counts["cached_tokens"] == (len(PROMPT) + 11) * left / LAYERS
    assert trace.kept[0] == [[0.0 if i in out else 1.0] * len(PROMPT) for i in range(LAYERS)]
    assert session.acted["layer-skip"] == 13 * len(out)  # the prefill of both, and decode steps


@pytest.mark.parametrize("spec", [{"chunk_size": 7}, {"attention": "eager"}])
@pytest.mark.parametrize("out", [0, 2])
def test_padded_batches_chunks_and_kernels(out: int, spec: dict[str, Any]) -> None:
    session = llama(**spec)
    prompts = [PROMPT, prompt(23, seed=1)]
    with attached(session, LayerSkip(start=out / LAYERS)):
        trace = generate(session, prompts, 8)
    assert tokens(trace) == tokens(generate(shortened(llama(), [out]), prompts, 8))


STACKS = (
    "rtn",
    "rtn:bits=4",
    "dynamic-int8",
    "magnitude",
    "kivi:bits=8,residual=8,group_size=8",
    "snapkv:keep=0.4",
    "h2o:keep=0.4",
    "knorm:keep=0.4",
    "streamingllm:keep=0.4",
    "snapkv:keep=0.4+kivi:bits=8,residual=8,group_size=8",
    "prompt-lookup",
    "lean-decode",
    "snapkv:keep=0.4+kivi:bits=8,residual=8,group_size=8+lean-decode",
    "rtn+prompt-lookup+lean-decode",
    "h2o:keep=0.4+lean-decode",
)


@pytest.mark.parametrize("out", [[0], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("text", STACKS)
def test_any_stack_does_what_it_does_on_the_shorter_model(text: str, out: list[int]) -> None:
    session = llama()
    knobs = {"start": out[0] / LAYERS, "count": len(out)}
    assert pipeline_problems(parse_pipeline(f"{text}+layer-skip:count={len(out)}"), catalogue(), session.info) == []
    with attached(session, *effective(parse_pipeline(text)), LayerSkip(**knobs)):
        got, logits = generate(session, [PROMPT], 12), forced(session, PROMPT, prompt(6, seed=3))
    short = shortened(llama(), out)
    with attached(short, *effective(parse_pipeline(text))):
        expected, reference = generate(short, [PROMPT], 12), forced(short, PROMPT, prompt(6, seed=3))
    assert tokens(got) == tokens(expected)
    torch.testing.assert_close(logits, reference, rtol=1e-5, atol=2e-5)
    share = {"kept_prompt_tokens": (LAYERS - len(out)) / LAYERS, "cached_tokens": (LAYERS - len(out)) / LAYERS}
    assert got.counts == pytest.approx({k: v * share.get(k, 1) for k, v in expected.counts.items()})
    assert [layer for i, layer in enumerate(got.kept[0]) if i not in out] == expected.kept[0]
    if "rtn" not in text and "magnitude" not in text and "dynamic" not in text:  # those count modules, skipped ones too
        acted = dict(session.acted)
        assert acted.pop("layer-skip") > 0
        assert acted == pytest.approx(short.acted)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(("out", "depth", "shorter"), [(2, 0.5, 0.67), (0, 0.5, 0.33)])
def test_prompt_tokens_that_stop_midway(out: int, depth: float, shorter: float, truncate: bool) -> None:
    """The same layer chooses, which is another share of the shorter model's depth."""
    from workers.policies.tokens.promptdistill import PromptDistill

    session, short = llama(), shortened(llama(), [out])
    with attached(session, PromptDistill(depth=depth, truncate=truncate), LayerSkip(start=out / LAYERS)):
        got = generate(session, [PROMPT], 8)
    with attached(short, PromptDistill(depth=shorter, truncate=truncate)):
        expected = generate(short, [PROMPT], 8)
    assert tokens(got) == tokens(expected)
    assert got.counts["kv_bytes"] == expected.counts["kv_bytes"]


def test_a_long_prompt_behind_a_first_layer_that_is_left_out() -> None:
    """Tables of rotary angles are as long as what the model has seen, which the empty layer does not know."""
    session, long = llama(), prompt(300, seed=2)
    with attached(session, *effective(parse_pipeline("layer-skip:start=0+lean-decode"))):
        got = generate(session, [long], 6)
    assert tokens(got) == tokens(generate(shortened(llama(), [0]), [long], 6))


def test_an_empty_layer_in_the_cache() -> None:
    session = llama()
    with attached(session, LayerSkip(start=0.0)):
        state = prefill(session, PROMPT)
    cache = state.cache
    assert cache.seen == len(PROMPT)
    assert cache.layers[0].groups == []
    assert cache.layers[0].nbytes() == 0
    assert cache.layers[0].stored == 0
    assert cache.nbytes() == 3 * len(PROMPT) * PER_TOKEN
    assert cache.stored() == len(PROMPT) * 3 / 4
    twin = cache.clone()
    twin.crop_newest(5)
    twin.reserve(4)
    assert twin.layers[0].seen == 0
    assert twin.layers[0].get_mask_sizes(1) == (1, 0)
    assert twin.seen == len(PROMPT) - 5
    assert cache.seen == len(PROMPT)
    assert kept_shares(cache, [len(PROMPT)])[0][0] == [0.0] * len(PROMPT)


def test_as_many_layers_as_there_are_is_refused_and_mended() -> None:
    info = info_of(tiny.llama_folder("llama-4", num_hidden_layers=LAYERS))
    (problem,) = pipeline_problems(parse_pipeline("layer-skip:count=4"), catalogue(), info)
    assert "4 layers" in problem.message
    assert problem.mend is not None
    assert (problem.mend.knob, problem.mend.value) == ("count", 3)
    assert pipeline_problems(parse_pipeline("layer-skip:count=3"), catalogue(), info) == []


def test_with_no_layer_left_the_head_reads_the_embedding() -> None:
    session = llama()
    with attached(session, LayerSkip(count=9)):
        trace = generate(session, [PROMPT], 5)
    model: Any = session.model
    expected, last = [], PROMPT[-1]
    with torch.inference_mode():
        for _ in range(5):
            last = int(model.lm_head(model.model.norm(model.model.embed_tokens(torch.tensor([last])))).argmax())
            expected.append(last)
    assert tokens(trace) == [expected]
    assert trace.counts["kv_bytes"] == 0
    assert trace.counts["cached_tokens"] == 0


def test_learnt_positions_and_fused_projections() -> None:
    """GPT-2, whose layers take and return what no other's do."""
    folder = tiny.gpt2_folder("gpt2-4", n_layer=LAYERS)
    session = make_session(folder)
    with attached(session, LayerSkip(start=0.5)):
        logits = forced(session, PROMPT, prompt(6, seed=3))
    short = without(library_model(folder, "sdpa"), lambda m: m.transformer.h, [2])
    with torch.inference_mode():
        every = short(torch.tensor([[*PROMPT, *prompt(6, seed=3)]])).logits
    torch.testing.assert_close(logits, every[0, len(PROMPT) - 1 : -1].log_softmax(-1), rtol=1e-5, atol=2e-5)


def test_none_left_out_is_the_model_itself() -> None:
    session = llama()
    with attached(session, LayerSkip(count=0)):
        same = forced(session, PROMPT, prompt(6, seed=3))
    assert torch.equal(same, forced(session, PROMPT, prompt(6, seed=3)))
    assert session.acted == {}


# -- models that see -----------------------------------------------------------------------
@every_run
def test_a_vlm_skips_in_its_language_model(knobs: dict[str, Any], out: list[int]) -> None:
    folder, item = tiny_vision.llava_folder(layers=LAYERS), seeing.one()
    session = seeing_session(folder)
    with attached(session, LayerSkip(**knobs)):
        trace, state = run_items(session, [item], 6), seeing.prefilled(session, item)
    what = seeing.given(folder, item)
    model = without(what.model, lambda m: m.model.language_model.layers, out)
    logits, expected = seeing.greedy(replace(what, model=model), 6)
    torch.testing.assert_close(state.logits[0], logits, **seeing.CLOSE)
    assert tokens(trace) == [expected]
    assert trace.counts["prefill_kv_bytes"] == (LAYERS - len(out)) * len(what.ids) * PER_TOKEN
    assert trace.counts["visual_tokens"] == len(what.places)
    assert trace.seen[0].share == [1.0] * len(what.places)


def test_a_vlm_skips_with_lean_steps_and_fewer_image_tokens() -> None:
    folder, item = tiny_vision.llava_folder(layers=LAYERS), seeing.one()
    found = []
    for text in ("layer-skip:start=0", "layer-skip:start=0+lean-decode"):
        session = seeing_session(folder)
        with attached(session, *effective(parse_pipeline(f"{text}+random-visual:keep=0.3+h2o:keep=0.5"))):
            trace = run_items(session, [item], 6)
        counts = {k: v for k, v in trace.counts.items() if k != "encode_s"}
        found.append((tokens(trace), counts, trace.kept))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "knobs", "out"),
    [
        ("vit", {}, [1]),
        ("vit", {"start": 0.0}, [0]),
        ("deit", {}, [1]),
        ("dinov2", {"start": 0.0}, [0]),
        ("clip_vision", {}, [1]),
        ("clip_vision", {"count": 2}, [1, 2]),
        ("clip_vision", {"start": 0.0, "count": 2}, [0, 1]),
    ],
)
def test_an_encoder_skips_its_own_layers(name: str, knobs: dict[str, Any], out: list[int]) -> None:
    session = seeing_session(encoders.ENCODERS[name](), "classify")
    with attached(session, LayerSkip(**knobs)):
        trace = run_items(session, [image_item("classify")])
    model = without(encoders.library(name), encoders.module_list, out)
    with torch.inference_mode():
        whole = model(encoders.pixels_of(session))
    if trace.logits:
        torch.testing.assert_close(trace.logits[0][0], whole.logits[0].log_softmax(-1), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(trace.features[0], whole.pooler_output[0], rtol=1e-5, atol=1e-5)
    assert trace.counts["visual_tokens"] == encoders.PATCHES
    assert session.acted["layer-skip"] == len(out)
