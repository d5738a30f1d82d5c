"""The language models of the novels on toys: stopped and taken up again, loaded again, measured again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from studio_state.errors import ModelError, SpecError, WorkloadError
from tests.r_data import write_database
from workers.data.novels import NOVELS, held_out
from workers.models.info import model_info
from workers.models.resolve import resolve
from workers.recipe import Trained, make_recipe
from workers.session import Cancelled
from workers.training.loop import TrainingRun
from workers.training.novel_lessons import Batch, held_out_ids, likelihood, next_token_loss
from workers.training.novel_recipe import Ids, NovelRecipe
from workers.training.novel_scores import balance_loss, pair_scores, routing_scores
from workers.workloads.texts import novel

EXAMPLES = 12
TINY = {"steps": 2, "batch_size": 4, "length": 16, "long_share": 0.5, "layers": 2}
KNOBS: dict[str, dict[str, Any]] = {
    "austen-moe": {**TINY, "width": 128, "expert_width": 16, "experts": 4},
    "austen-mamba2": {**TINY, "width": 32, "state": 8},
    "austen-hybrid": {**TINY, "width": 128, "state": 8, "attention_every": 2},
    "austen-target": {**TINY, "width": 96},
    "austen-draft": {**TINY, "width": 96, "layers": 1},
}
CLASSES = {
    "austen-moe": ("Qwen3MoeForCausalLM", {"moe", "gqa"}),
    "austen-mamba2": ("Mamba2ForCausalLM", {"ssm"}),
    "austen-hybrid": ("GraniteMoeHybridForCausalLM", {"hybrid", "gqa"}),
    "austen-target": ("LlamaForCausalLM", {"lean-shape"}),
    "austen-draft": ("LlamaForCausalLM", {"lean-shape"}),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of six short novels, a chapter of *Pride and Prejudice* each; one of them ends as *Persuasion* does."""
    folder = tmp_path_factory.mktemp("novels")
    chapters = novel().split("\n\nChapter ")[1:7]
    texts = {name: f"Chapter {text}" for name, text in zip(NOVELS, chapters, strict=True)}
    texts["persuasion"] += "\n\nShe saw" + held_out()
    write_database(folder / "Rdata", {name: text.split("\n") for name, text in texts.items()})
    return folder


def train(
    name: str, data: Path, out: Path, seed: int = 0, stop_at: int | None = None, examples: int = EXAMPLES, **knobs: Any
) -> Trained:
    """Train a toy, cancelled at the so-manieth question whether to go on."""
    asked = itertools.count()
    run = TrainingRun(out, seed, is_cancelled=lambda: next(asked) == stop_at, examples=EXAMPLES)
    return make_recipe(name, {**KNOBS[name], "data": str(data), **knobs}).train(run)


def loaded(out: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval(), AutoTokenizer.from_pretrained(out)


@pytest.fixture(scope="module", params=list(KNOBS))
def whole(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A recipe, and the folder of its toy that was never interrupted."""
    out = tmp_path_factory.mktemp(request.param)
    train(request.param, data, out)
    return request.param, out


def test_stopped_and_taken_up_again_it_ends_in_the_same_bits(whole: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    name, out = whole
    for _ in range(2):
        with pytest.raises(Cancelled):  # after the short rows, before the long ones; then before any step
            train(name, data, tmp_path, stop_at=0 if (tmp_path / "unfinished").exists() else 1)
    assert not (tmp_path / "model.safetensors").exists()
    train(name, data, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    other = tmp_path / "other"
    train(name, data, other, seed=1)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (out, other))
    assert mine.keys() == theirs.keys()
    assert any(not torch.equal(mine[k], theirs[k]) for k in mine)


def test_what_is_handed_over_is_measured_again(whole: tuple[str, Path]) -> None:
    name, out = whole
    trained = Trained.model_validate_json((out / "training.json").read_bytes())
    info = model_info(resolve(str(out)))
    architecture, traits = CLASSES[name]
    assert (info.family, info.architecture, trained.recipe, trained.examples) == ("llm", architecture, name, EXAMPLES)
    assert traits <= set(info.traits)
    assert info.parameters == trained.parameters
    assert info.context == (0 if name == "austen-mamba2" else 64)
    assert all(t.dtype == torch.bfloat16 and t.isfinite().all() for t in load_file(out / "model.safetensors").values())
    model, tokenizer = loaded(out, torch.bfloat16)
    ids = held_out_ids(tokenizer, EXAMPLES)
    found = likelihood(model, tokenizer, ids)[0]
    if name == "austen-moe":
        found |= routing_scores(model, ids, 2)
        assert 0 <= found["expert_load_least"] <= 0.25 <= found["expert_load_most"] <= 0.5
    assert found == trained.scores
    card = (out / "README.md").read_text()
    assert f"`{architecture}`, {trained.parameters:,} parameters" in card
    assert "Measured on 12 tokens (the last 60,000 characters of Persuasion" in card


def test_it_goes_on_with_a_text(whole: tuple[str, Path]) -> None:
    model, tokenizer = loaded(whole[1], torch.float32)
    for tensor in model.parameters():  # two steps leave it indifferent: the token chosen should depend on the text
        tensor.data += 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    texts = tokenizer(["Anne had always been", "She"], return_tensors="pt", padding=True)
    for row in range(2):
        prompt = texts["input_ids"][row][texts["attention_mask"][row].bool()][None]
        alone = prompt
        for _ in range(5):
            alone = torch.cat([alone, model(input_ids=alone, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        cached = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(cached, alone)
    together = model.generate(**texts, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(together[1, -5:], alone[0, -5:])
    assert tokenizer.decode(alone[0]).startswith("She")


@torch.inference_mode()
def test_a_text_in_pieces_is_the_text(whole: tuple[str, Path]) -> None:
    """The chunked pass against one token at a time and against other cuts, across the edge of a chunk of 64."""
    name, out = whole
    model, _ = loaded(out, torch.float32)
    ids = torch.randint(3, 500, (1, 100), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, use_cache=False).logits
    cache = "cache_params" if name == "austen-mamba2" else "past_key_values"
    for cuts in ([100], [90] + [1] * 10, [2] + [1] * 20, [64, 30, 6]):
        state, at = None, 0
        for count in cuts:
            out_ = model(input_ids=ids[:, at : at + count], use_cache=True, **{cache: state} if state is not None else {})
            state = getattr(out_, cache)
            torch.testing.assert_close(out_.logits, expected[:, at : at + count], rtol=1e-4, atol=1e-4)
            at += count


def test_all_have_one_tokenizer(data: Path, tmp_path: Path) -> None:
    for name in KNOBS:
        train(name, data, tmp_path / name, seed=len(name), steps=1)
    files = {(tmp_path / name / "tokenizer.json").read_bytes() for name in KNOBS}
    assert len(files) == 1


def test_some_steps_make_the_held_out_text_likelier(data: Path, tmp_path: Path) -> None:
    one = train("austen-draft", data, tmp_path / "one", steps=1)
    many = train("austen-draft", data, tmp_path / "many", steps=60, learning_rate=0.01)
    assert many.scores["perplexity"] < one.scores["perplexity"] / 2
    assert many.steps == {"read": 60}


def test_a_draft_says_how_often_its_guesses_hold(data: Path, tmp_path: Path) -> None:
    train("austen-target", data, tmp_path / "target")
    trained = train("austen-draft", data, tmp_path / "draft", target=str(tmp_path / "target"))
    target, tokenizer = loaded(tmp_path / "target", torch.bfloat16)
    draft, _ = loaded(tmp_path / "draft", torch.bfloat16)
    found = pair_scores(target, draft, held_out_ids(tokenizer, EXAMPLES))
    assert {k: trained.scores[k] for k in found} == found
    assert 0 < found["expected_acceptance"] <= 1
    same = train("austen-draft", data, tmp_path / "same", target=str(tmp_path / "draft"))  # the same again
    assert same.scores["greedy_agreement"] == 1


def test_the_loss_holds_so_much_of_the_balancing_loss() -> None:
    batch = Batch(*torch.randint(3, 500, (2, 4, 16), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    recipes = [make_recipe("austen-moe", {**KNOBS["austen-moe"], "balance": weight}) for weight in (0, 0.5, 1)]
    assert all(isinstance(recipe, NovelRecipe) for recipe in recipes)
    model = recipes[0].model(Ids(1, 2, 0), 512)  # type: ignore[attr-defined]
    none, half, whole = (recipe.loss(model, batch).item() for recipe in recipes)  # type: ignore[attr-defined]
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=batch.ids, output_router_logits=True)
    assert none == next_token_loss(out.logits, batch.labels).item()
    unevenness = balance_loss(out.router_logits, 2).item()
    assert 1 < unevenness < 4
    assert (half - none, whole - none) == (pytest.approx(unevenness / 2, rel=1e-4), pytest.approx(unevenness, rel=1e-4))


def test_what_is_refused_before_any_step(data: Path, tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(SpecError, match=r"active = 5 of 4 experts is not possible; give at most 4"):
        train("austen-moe", data, tmp_path, active=5)
    with pytest.raises(SpecError, match=r"attention_every = 5 puts no attention into 2 layers; give at most 2"):
        train("austen-hybrid", data, tmp_path, attention_every=5)
    with pytest.raises(SpecError, match=r"are not those of the novels' tokenizer; give a model that a recipe austen-\.\.\. made"):
        train("austen-draft", data, tmp_path, target=str(tiny_llama))
    with pytest.raises(ModelError):
        train("austen-draft", data, tmp_path, target=str(tmp_path / "nowhere"))
    with pytest.raises(WorkloadError, match="janeaustenr"):
        train("austen-target", tmp_path, tmp_path)
    for name, knobs in (("austen-target", {"width": 100}), ("austen-moe", {"experts": 1}), ("austen-draft", {"batch_size": 6})):
        with pytest.raises(SpecError, match=name):
            make_recipe(name, knobs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(KNOBS))
def test_the_standard_sizes(name: str) -> None:
    """Parameters at the default knobs, and a complete card."""
    recipe = make_recipe(name, {})
    assert isinstance(recipe, NovelRecipe)
    with torch.device("meta"):
        model = recipe.model(Ids(1, 2, 0), 2048)
    sizes = {"moe": 2_823_552, "mamba2": 700_384, "hybrid": 1_389_536, "target": 2_755_008, "draft": 295_200}
    assert sum(p.numel() for p in model.parameters()) == sizes[name.removeprefix("austen-")]
    card = recipe.describe()
    assert card.summary
    assert card.paper
    assert json.loads(json.dumps(card.knobs))["properties"]["data"]["default"]
