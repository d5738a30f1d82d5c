"""Speculative decoding: the same tokens as plain decoding in fewer passes, whoever drafts, and caches that show no trace of guesses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio_state.errors import ModelError, SpecError
from studio_state.events import Event, LaneFinished, Metric, Output
from studio_state.experiment import ExperimentSpec, ModelInfo, Sampling
from studio_state.pipeline import Pipeline, Step, parse_pipeline
from studio_state.problems import pipeline_problems
from tests import tiny, tiny_vision
from tests.methods.driving import (
    attached,
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
from tests.methods.test_contract import condition
from workers.engine import run as run_experiment
from workers.families.base import RunTrace
from workers.families.llm import Generation
from workers.mechanisms.drafting import DraftModel, FirstLayers, SmallModel, as_wide, common, load_draft, shared_ids
from workers.mechanisms.linear import held_bytes
from workers.mechanisms.sampling import Sampler
from workers.mechanisms.speculation import verify
from workers.mechanisms.weight_policy import weight_metrics
from workers.methods import catalogue, effective
from workers.policies.decode.speculative import Speculative
from workers.session import Cancelled, Session
from workers.workloads.base import Item

SAMPLED = Sampling(temperature=0.7)
MODELS: dict[str, Callable[[], Path]] = {
    "llama": tiny.llama_folder,
    "qwen3": tiny.qwen3_folder,
    "gemma3": tiny.gemma3_folder,  # a sliding window of 16 in the first layer
    "mistral": tiny.mistral_folder,  # in both
    "gpt2": tiny.gpt2_folder,
}
PROMPT = prompt(40)
KV_BYTES = 2 * 2 * 2 * 16 * 4  # of a position of the Llama: layers, keys and values, heads, width, bytes
every_model = pytest.mark.parametrize("model", MODELS)
both_samplings = pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])


def other_llama() -> Path:
    """A draft that is not related: other shape, other weights, the same words."""
    return tiny.llama_folder("llama-other", hidden_size=32, num_attention_heads=2, num_key_value_heads=1)


def drafted(session: Session, new: int = 24, ids: list[int] = PROMPT, **knobs: Any) -> RunTrace:
    with attached(session, Speculative(**knobs)):
        return generate(session, [ids], new=new)


# -- the output ----------------------------------------------------------------------------
def test_no_draft_is_the_baseline() -> None:
    session = make_session()
    expected, got = generate(session, [PROMPT], new=12), drafted(session, 12, draft=0, draft_model="no such model")
    assert tokens(got) == tokens(expected)
    assert got.counts == expected.counts
    assert session.acted == {}
    assert session.built == {}


@both_samplings
@every_model
def test_the_same_tokens_as_plain_decoding_whoever_drafts(model: str, sampling: Sampling) -> None:
    session = make_session(MODELS[model](), sampling=sampling, seed=5)
    expected = generate(session, [PROMPT], new=24)
    for knobs in ({}, {"draft_model": str(other_llama())}, {"draft_model": str(MODELS[model]()), "draft": 6}):
        got = drafted(session, **knobs)
        assert tokens(got) == tokens(expected)
        assert sum(len(s.new[0]) for s in got.steps) == 24
        assert got.counts["drafted_tokens"] > 0
        assert got.counts["forward_passes"] == 23 - got.counts["accepted_tokens"]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.2, top_k=9), Sampling(temperature=0.9, top_p=0.8)], ids=["top-k", "top-p"]
)
def test_every_way_of_sampling_stays(sampling: Sampling) -> None:
    session = make_session(sampling=sampling, seed=3)
    expected = tokens(generate(session, [PROMPT], new=24))
    assert tokens(drafted(session)) == expected
    assert tokens(drafted(session, draft_model=str(other_llama()))) == expected


@pytest.mark.parametrize("new", [1, 2, 3])
def test_short_texts(new: int) -> None:
    session = make_session()
    expected = tokens(generate(session, [PROMPT], new=new))
    for knobs in ({}, {"draft_model": str(tiny.llama_folder())}):
        got = drafted(session, new, **knobs)
        assert tokens(got) == expected
        assert got.counts.get("drafted_tokens", 0) == max(0, new - 2), (
            "a draft could be of use for all but the first and the last"
        )


def test_the_end_token_ends_the_text() -> None:
    session = make_session()
    plain = tokens(generate(session, [PROMPT], new=20))[0]
    ends = plain.index(plain[7]) + 1
    config = session.model.generation_config
    before, config.eos_token_id = config.eos_token_id, plain[7]
    try:
        for knobs in ({}, {"draft_model": str(tiny.llama_folder())}):
            with attached(session, Speculative(**knobs)):
                trace = session.family.begin(session, [Item(id="0", prompt_ids=tuple(PROMPT), max_new_tokens=20)])
                list(session.family.run(session, trace))
            assert trace.results[0].token_ids == plain[:ends]
    finally:
        config.eos_token_id = before


# -- counts worked by hand -----------------------------------------------------------------
@both_samplings
@every_model
@pytest.mark.parametrize(
    ("new", "passes", "guesses"),
    [(31, 6, 24), (33, 7, 25)],  # 30 tokens after the first = 6 x (4 + 1); 32 = 6 x (4 + 1) + (1 + 1)
)
def test_a_draft_that_is_the_model_itself_is_always_right(
    model: str, sampling: Sampling, new: int, passes: int, guesses: int
) -> None:
    """Also where tokens are drawn: the draft draws with the random numbers that the model will draw with."""
    session = make_session(MODELS[model](), sampling=sampling, seed=1)
    plain = generate(session, [PROMPT], new=new)
    got = drafted(session, new, draft_model=str(MODELS[model]()))
    assert tokens(got) == tokens(plain)
    assert got.counts["forward_passes"] == passes
    assert got.counts["accepted_tokens"] == got.counts["drafted_tokens"] == guesses


@both_samplings
def test_all_layers_of_the_model_are_always_right(sampling: Sampling) -> None:
    session = make_session(sampling=sampling, seed=1)
    plain, got = generate(session, [PROMPT], new=31), drafted(session, 31, layers=2)
    assert tokens(got) == tokens(plain)
    assert got.counts["forward_passes"] == 6
    assert got.counts["accepted_tokens"] == got.counts["drafted_tokens"] == 24
    assert got.counts["kv_bytes"] == plain.counts["kv_bytes"] == 70 * KV_BYTES, "no cache besides the model's"


def test_a_confidence_that_no_guess_reaches_guesses_nothing() -> None:
    session = make_session()
    expected = generate(session, [PROMPT], new=12)
    for knobs in ({}, {"draft_model": str(tiny.llama_folder())}):
        policy = Speculative(min_confidence=1.0, **knobs)
        with attached(session, policy):
            got = generate(session, [PROMPT], new=12)
        assert tokens(got) == tokens(expected)
        assert got.counts["forward_passes"] == 11
        assert got.counts["drafted_tokens"] == 0
        assert session.acted == {}
        assert "min_confidence is too high" in policy.why_idle(session)


def test_a_draft_stops_at_the_end_of_its_context() -> None:
    """It has learnt 50 positions: guesses are made until the newest token that it reads is at the last of them."""
    short = tiny.gpt2_folder("gpt2-short", n_positions=50)
    session = make_session(tiny.gpt2_folder())
    expected = tokens(generate(session, [PROMPT], new=24))
    got = drafted(session, draft_model=str(short))
    assert tokens(got) == expected
    with attached(session, Speculative(draft_model=str(short))):
        assert generate(session, [prompt(50)], new=4).counts["drafted_tokens"] == 0
        one = generate(session, [prompt(49)], new=6).counts["drafted_tokens"]
    assert one == 1, "the 50th token is the newest of the text"


# -- an independent implementation, without caches -----------------------------------------
Guesser = Callable[[list[int]], Tensor]


def first_layers_of(folder: Path, count: int) -> Guesser:
    """Final norm and head of the library on the hidden state after the first layers."""
    model = library_model(folder, "eager")

    def last(ids: list[int]) -> Tensor:
        kept: list[Tensor] = []
        hook = model.model.layers[count - 1].register_forward_hook(
            lambda module, args, out: kept.append(out if isinstance(out, Tensor) else out[0])
        )
        try:
            model(torch.tensor([ids]))
        finally:
            hook.remove()
        out: Tensor = model.lm_head(model.model.norm(kept[0]))[0, -1]
        return out

    return last


def whole(folder: Path) -> Guesser:
    model = library_model(folder, "eager")
    return lambda ids: model(torch.tensor([ids])).logits[0, -1]  # type: ignore[no-any-return]


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))


@torch.inference_mode()
def by_hand(target: Guesser, small: Guesser, new: int, width: int, least: float, temperature: float, seed: int) -> dict[str, Any]:
    """Speculative decoding written from the rule alone: every logit from a pass over the whole text."""
    generator = torch.Generator().manual_seed(seed)
    text = [*PROMPT, choose(target(PROMPT), temperature, generator)]
    passes = guesses = kept = 0
    while len(text) < len(PROMPT) + new:
        ahead = torch.Generator()
        ahead.set_state(generator.get_state())
        draft: list[int] = []
        for _ in range(min(width, len(PROMPT) + new - len(text) - 1)):
            logits = small(text + draft)
            if logits.softmax(0).max() < least:
                break
            draft.append(choose(logits, temperature, ahead))
        guesses, passes = guesses + len(draft), passes + 1
        for guess in [*draft, None]:
            text.append(choose(target(text), temperature, generator))
            if text[-1] != guess:
                break
            kept += 1
    return {"tokens": text[len(PROMPT) :], "passes": passes, "guesses": guesses, "kept": kept}


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Copies of the models with a little noise on every weight: drafts that are often right, but not always."""

    @cache
    def make(name: str) -> Path:
        folder, noise = tmp_path_factory.mktemp("near") / name, torch.Generator().manual_seed(0)
        shutil.copytree(MODELS[name](), folder)
        weights = load_file(folder / "model.safetensors")
        for key, x in weights.items():
            weights[key] = x + 0.012 * torch.randn(x.shape, generator=noise)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@both_samplings
@pytest.mark.parametrize("least", [0.0, 0.1])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3", "mistral", "gpt2"])
def test_counts_equal_those_of_an_implementation_without_caches(
    model: str, sampling: Sampling, least: float, near: Callable[[str], Path]
) -> None:
    folder = MODELS[model]()
    session = make_session(folder, sampling=sampling, seed=7)
    drafts: list[tuple[Guesser, dict[str, Any]]] = [(whole(near(model)), {"draft_model": str(near(model))})]
    if model != "gpt2":  # its parts have other names
        drafts.append((first_layers_of(folder, 1), {"layers": 1}))
    for small, knobs in drafts:
        expected = by_hand(whole(folder), small, 20, 3, least, sampling.temperature, 7)
        got = drafted(session, 20, draft=3, min_confidence=least, **knobs)
        assert tokens(got)[0] == expected["tokens"]
        counts = [got.counts[n] for n in ("forward_passes", "drafted_tokens", "accepted_tokens")]
        assert counts == [expected[n] for n in ("passes", "guesses", "kept")]
        if "draft_model" in knobs:
            assert 0 < expected["kept"] < expected["guesses"] + (least > 0), "right sometimes, not always"
            assert least == 0 or expected["guesses"] < 3 * expected["passes"] - 3, "cut short at least once"


# -- caches --------------------------------------------------------------------------------
def beginning(session: Session) -> Generation:
    state = prefill(session, PROMPT)
    return Generation(session.family, None, state, Sampler(session.spec.sampling, 0, session.device), state.logits.argmax(-1), 30)  # type: ignore[arg-type]


def stored(cache: Any) -> list[Tensor]:
    return [x.clone() for layer in cache.layers for x in layer.group.store.read()]


@every_model
@torch.inference_mode()
def test_first_layers_leave_the_cache_as_it_was(model: str) -> None:
    session = make_session(MODELS[model]())
    run = beginning(session)
    before, position = stored(run.state.cache), run.state.next_position
    with session.having(decoder=None):
        guesses = FirstLayers(session, run, 1, 5, 0.0)([*PROMPT, int(run.first)], 30)
    assert len(guesses) == 5
    assert [layer.seen for layer in run.state.cache.layers] == [40, 40]
    assert torch.equal(run.state.next_position, position)
    for x, y in zip(stored(run.state.cache), before, strict=True):
        assert torch.equal(x, y)


@every_model
@torch.inference_mode()
def test_a_small_model_reads_on_where_the_texts_part(model: str) -> None:
    """Lengths by hand, and the entries of a prefill of the same tokens."""
    folder = MODELS[model]()
    session = make_session(folder)
    run, small = beginning(session), load_draft(session, str(folder))
    drafter = SmallModel(session, run, small, 4, 0.0)
    text = [*PROMPT, int(run.first)]
    guesses = drafter(text, 30)
    assert drafter.read == [*text, *guesses[:3]]  # the newest guess is not read
    text += verify(session, run, text[-1], guesses)  # all right, and one more
    assert text[41:45] == guesses
    assert run.state.cache.seen == len(text) - 1 == 45
    guesses = drafter(text, 30)
    assert drafter.read == [*text, *guesses[:3]]
    text += [guesses[0], (guesses[1] + 1) % tiny.VOCAB]  # the second one is refused
    guesses = drafter(text, 2)
    assert len(guesses) == 2
    assert drafter.read == [*text, guesses[0]]
    assert drafter.state is not None
    cache = drafter.state.cache
    assert [layer.seen for layer in cache.layers] == [layer.group.store.length for layer in cache.layers] == [49, 49]
    assert int(drafter.state.next_position) == 49
    fresh = prefill(session, drafter.read).cache
    for x, y in zip(stored(cache), stored(fresh), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


# -- bytes ---------------------------------------------------------------------------------
def test_weights_and_cache_of_the_draft_model_count() -> None:
    session = make_session()
    alone, plain = weight_metrics(session)["weight_bytes"], generate(session, [PROMPT], new=31)
    small = other_llama()
    with attached(session, Speculative(draft_model=str(small))):
        assert weight_metrics(session)["weight_bytes"] == alone + held_bytes([load(small)])
    assert weight_metrics(session)["weight_bytes"] == alone
    with attached(session, Speculative()):
        assert weight_metrics(session)["weight_bytes"] == alone
    got = drafted(session, 31, draft_model=str(tiny.llama_folder()))
    assert plain.counts["kv_bytes"] == 70 * KV_BYTES
    assert got.counts["kv_bytes"] == (70 + 69) * KV_BYTES  # the draft reads neither the last token nor its last guess
    assert got.counts["prefill_kv_bytes"] == plain.counts["prefill_kv_bytes"]


def test_one_draft_model_serves_all_lanes_and_goes_with_the_experiment() -> None:
    session = make_session()
    with session.closing():
        for knobs in ({"draft": 2}, {"draft": 3}, {"min_confidence": 0.5}):
            drafted(session, 4, draft_model=str(other_llama()), **knobs)
            assert [k for k in session.built if k[0] is DraftModel] == [(DraftModel, str(other_llama()))]  # type: ignore[index]
    assert session.built == {}


# -- what is refused -----------------------------------------------------------------------
def changed(folder: Path, target: Path, change: Callable[[dict[str, int]], None]) -> Path:
    """A copy with another vocabulary."""
    shutil.copytree(folder, target)
    words = json.loads((target / "tokenizer.json").read_text())
    change(words["model"]["vocab"])
    (target / "tokenizer.json").write_text(json.dumps(words))
    return target


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    def swap(vocabulary: dict[str, int]) -> None:
        vocabulary["!"], vocabulary["0"] = vocabulary["0"], vocabulary["!"]

    other = changed(other_llama(), tmp_path / "swapped", swap)
    session = make_session()
    with pytest.raises(
        SpecError, match=r"another vocabulary than .*: 512 tokens against 512, 2 of them differ \(first: '!', '0'\)"
    ):
        Speculative(draft_model=str(other)).prepare(session)
    with pytest.raises(SpecError, match="give a smaller model of the same family, or none"):
        Speculative(draft_model=str(other)).attach(session)
    assert session.built == {}


def test_vocabularies_may_differ_in_tokens_that_were_added_to_the_models() -> None:
    class Words:
        def __init__(self, vocabulary: dict[str, int], added: tuple[str, ...] = ()):
            self.get_vocab, self.get_added_vocab = lambda: vocabulary, lambda: {t: vocabulary[t] for t in added}

    plain, more = {"a": 0, "b": 1}, {"a": 0, "b": 1, "<image>": 2}
    assert shared_ids(Words(plain), Words(plain), "m", "d") == {0, 1}
    assert shared_ids(Words(more, ("<image>",)), Words(plain), "m", "d") == {0, 1}
    for mine, theirs in ((more, plain), (plain, more), (plain, {"a": 1, "b": 0}), (plain, {"a": 0})):
        with pytest.raises(SpecError):
            shared_ids(Words(mine), Words(theirs), "m", "d")


def state_space_folder(target: Path) -> Path:
    from transformers import AutoModelForCausalLM, Mamba2Config

    shape = {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "expand": 2, "hidden_size": 16}
    config = Mamba2Config(vocab_size=tiny.VOCAB, num_hidden_layers=1, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tiny.tokenizer().save_pretrained(target)
    return target


def test_drafts_that_cannot_draft_are_refused(tmp_path: Path) -> None:
    session = make_session()
    with pytest.raises(SpecError, match=r"'ssm'\), whose running state cannot be taken back"):
        load_draft(session, str(state_space_folder(tmp_path / "mamba2")))
    with pytest.raises(SpecError, match="is of family vit; give a language model"):
        load_draft(session, str(tiny_vision.vit_folder()))
    with pytest.raises(ModelError, match="there is no model 'nowhere'"):
        load_draft(session, "nowhere")


def problems_of(name: str, knobs: dict[str, Any], model: ModelInfo) -> list[str]:
    pipeline = Pipeline(steps=(Step(policy=name, knobs=knobs),))
    return [p.message for p in pipeline_problems(pipeline, catalogue(), model)]


def test_what_does_not_fit_the_model_is_said_before_it_loads() -> None:
    info = make_session().info
    assert problems_of("speculative", {"layers": 1}, info) == []
    assert ["layers = 2, but" in m for m in problems_of("speculative", {"layers": 2}, info)] == [True]
    running = info.model_copy(update={"traits": ("hybrid", "ssm"), "name": "mamba"})
    for name in ("speculative", "prompt-lookup"):
        [message] = problems_of(name, {}, running)
        assert "has to take refused tokens back, but mamba has state-space layers (trait 'ssm')" in message
    assert problems_of("snapkv", {}, running) == []


@pytest.mark.parametrize(
    ("text", "because"),
    [("speculative+prompt-lookup", "decode.loop"), ("kivi+speculative", "kv.rollback"), ("h2o+speculative", "kv.rollback")],
)
def test_illegal_stacks(text: str, because: str) -> None:
    [problem] = pipeline_problems(parse_pipeline(text), catalogue())
    assert because in problem.message


@pytest.mark.parametrize("knobs", ["", ":draft_model={}"], ids=["first-layers", "small-model"])
@pytest.mark.parametrize(
    "others",
    ["rtn:bits=4", "magnitude+rtn", "promptdistill", "promptdistill:truncate=true", "layer-skip:start=0.9", "lean-decode"],
)
def test_a_stack_says_what_it_says_without(others: str, knobs: str) -> None:
    """The first layers are those of the lane: packed, pruned or left out where it has them so."""
    session = make_session()
    with attached(session, *effective(parse_pipeline(others))):
        expected = tokens(generate(session, [PROMPT], new=24))
    mine = "speculative" + knobs.format(json.dumps(str(other_llama())))
    with attached(session, *effective(parse_pipeline(f"{others}+{mine}"))):
        got = generate(session, [PROMPT], new=24)
    assert tokens(got) == expected
    assert got.counts["drafted_tokens"] > 0
    if others == "layer-skip:start=0.9" and not knobs:  # the lane is its first layer alone
        assert got.counts["accepted_tokens"] == got.counts["drafted_tokens"]


# -- no trace ------------------------------------------------------------------------------
@pytest.mark.parametrize("knobs", [{}, {"draft_model": "llama"}], ids=["first-layers", "small-model"])
def test_nothing_stays_behind_also_when_cancelled_in_a_draft(knobs: dict[str, str]) -> None:
    session = make_session()
    before, plain = condition(session), generate(session, [PROMPT], new=8)
    policy = Speculative(**{k: str(tiny.llama_folder()) for k in knobs})
    asked = iter([False] * 3)  # the prefill, then in the first draft
    with session.having(is_cancelled=lambda: next(asked, True)), attached(session, policy), pytest.raises(Cancelled):
        generate(session, [PROMPT], new=8)
    assert condition(session) == before
    again = generate(session, [PROMPT], new=8)
    assert (tokens(again), again.counts) == (tokens(plain), plain.counts)


# -- vocabularies padded to different widths ------------------------------------------------
def test_widths_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert as_wide(x, 2).tolist() == [[1, 2]]
    assert as_wide(x, 3).tolist() == [[1, 2, 3]]
    assert as_wide(x, 4).tolist() == [[1, 2, 3, float("-inf")]]
    assert [common([], [1]), common([1, 2], [1, 2, 3]), common([1, 2, 3], [1, 3])] == [0, 2, 1]


@both_samplings
@pytest.mark.parametrize("wide", ["model", "draft"])
def test_padded_vocabularies(wide: str, sampling: Sampling) -> None:
    """A random model does say tokens that its tokenizer lacks; the draft cannot read them and leaves them out."""
    plain, padded = tiny.llama_folder(), tiny.llama_folder("llama-padded", vocab_size=700)
    folder, small = (padded, plain) if wide == "model" else (plain, padded)
    session = make_session(folder, sampling=sampling)
    expected = tokens(generate(session, [PROMPT], new=24))
    assert any(t >= tiny.VOCAB for t in expected[0]) == (wide == "model")
    assert tokens(drafted(session, draft_model=str(small))) == expected


# -- models that see -----------------------------------------------------------------------
def test_a_draft_model_reads_the_words_around_an_image() -> None:
    session = seeing_session(tiny_vision.llava_folder())
    item = image_item()
    expected = tokens(run_items(session, [item], 12))
    policy = Speculative(draft_model=str(tiny.llama_folder()))
    with attached(session, policy):
        got = run_items(session, [item], 12)
        small = session.built[DraftModel, policy.draft_model]
    assert tokens(got) == expected
    assert got.counts["drafted_tokens"] > 0
    image = session.model.config.image_token_id
    ids = got.results[0].prompt_ids
    assert ids.count(image) == 64
    assert {i for i in ids if i not in small.known} == {image}


def test_a_draft_model_that_knows_the_placeholder_leaves_it_out_too(tmp_path: Path) -> None:
    session, small = seeing_session(tiny_vision.llava_folder()), tmp_path / "llama"
    shutil.copytree(tiny.llama_folder("llama-padded", vocab_size=700), small)
    session.processor.save_pretrained(small)
    image = session.processor.convert_tokens_to_ids("<image>")
    assert load_draft(session, str(small)).known == set(range(len(session.processor))) - {image}
    expected = tokens(run_items(session, [image_item()], 8))
    with attached(session, Speculative(draft_model=str(small))):
        assert tokens(run_items(session, [image_item()], 8)) == expected


def test_all_layers_of_a_model_that_sees_are_always_right() -> None:
    """They see the image, through the model's own cache: blind they could not be."""
    for folder in (tiny_vision.llava_folder(), tiny_vision.qwen2_5_vl_folder()):
        session = seeing_session(folder)
        expected = tokens(run_items(session, [image_item()], 16))
        with attached(session, Speculative(layers=2)):
            got = run_items(session, [image_item()], 16)
        assert tokens(got) == expected
        assert got.counts["forward_passes"] == 3
        assert got.counts["accepted_tokens"] == got.counts["drafted_tokens"] == 12


# -- as the engine runs it -----------------------------------------------------------------
def test_a_race(tmp_path: Path) -> None:
    def swap(vocabulary: dict[str, int]) -> None:
        vocabulary["!"], vocabulary["0"] = vocabulary["0"], vocabulary["!"]

    wrong = changed(other_llama(), tmp_path / "swapped", swap)
    lanes = [
        [{"policy": "speculative", "knobs": {"draft_model": str(tiny.llama_folder())}}],
        [{"policy": "speculative", "knobs": {"draft_model": str(wrong)}}],
    ]
    spec = ExperimentSpec.model_validate(
        {
            "model": str(tiny.llama_folder()), "workload": {"id": "prompts", "options": {"text": "Once upon a time"}},
            "lanes": [{"steps": s} for s in lanes], "threads": 1, "max_new_tokens": 11, "eos": "ignore",
        }
    )  # fmt: skip
    events: list[Event] = list(run_experiment(spec))
    assert {e.lane: e.status for e in events if isinstance(e, LaneFinished)} == {0: "finished", 1: "finished", 2: "failed"}
    [failed] = [e for e in events if isinstance(e, LaneFinished) and e.lane == 2]
    assert "another vocabulary" in failed.message
    texts = {e.lane: e.data["token_ids"] for e in events if isinstance(e, Output)}
    assert texts[0] == texts[1]

    def value(lane: int, name: str) -> float:
        return next(e.value for e in events if isinstance(e, Metric) and (e.lane, e.name) == (lane, name))

    assert value(1, "weight_bytes") == 2 * value(0, "weight_bytes")
    assert value(1, "forward_passes") == 2
    assert value(1, "accepted_tokens") == value(1, "drafted_tokens") == 8
    assert value(1, "kv_bytes") == 2 * value(0, "kv_bytes") - KV_BYTES
