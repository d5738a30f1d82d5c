"""The scores that the studio's own models state, measured again on the files that ship."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from studio_state import zoo
from studio_state.catalog import asset
from studio_state.zoo import InRepo, Rearranged
from tests.sampling import first
from workers.models.expert_split import EXPERTS, read_plan
from workers.recipe import FACTS, Trained, make_recipe, recipes

OWN = [e for e in zoo.entries() if isinstance(e.source, InRepo)]
SCENES = {"scene-vlm": 96, "scene-vlm-tiled": 192}  # edge of the scenes in pixels
DRAWING = [e.id for e in OWN if e.family == "diffusion"]
NOVELS = [e.id for e in OWN if e.id.startswith("austen")]
FEW = 50  # scenes, six questions each


def facts(folder: str) -> Trained:
    return Trained.model_validate_json((asset("zoo") / folder / FACTS).read_text())


def test_every_model_that_ships_was_made_by_a_recipe() -> None:
    made = {facts(e.source.folder).recipe for e in OWN if isinstance(e.source, InRepo)}
    assert {"fashion-vit", "scene-vlm", "fashion-unet"} <= made <= set(recipes())


def test_the_plan_of_the_regrouped_model_is_what_its_recipe_made() -> None:
    entry = zoo.get("smollm2-moe8")
    assert isinstance(entry.source, Rearranged)
    found, plan = facts(entry.id), read_plan(asset("zoo") / entry.source.plan)
    assert make_recipe(found.recipe, found.knobs).model_dump() == found.knobs
    assert found.knobs["start"] == entry.source.base
    assert found.scores["perplexity_8"] == pytest.approx(found.scores["perplexity_dense"], rel=1e-4)
    assert found.scores["perplexity_8"] < found.scores["perplexity_7_oracle"] < found.scores["perplexity_7"]
    assert all((row.bincount(minlength=EXPERTS) == row.numel() // EXPERTS).all() for row in plan.assignment)


@pytest.mark.slow
def test_the_regrouped_model_writes_what_the_dense_one_writes() -> None:
    """Greedy, token by token, in float32, on the library's own loop."""
    from workers.models.load import load_model
    from workers.models.resolve import resolve

    texts, said = ("The capital of France is", "She looked at Mr. Darcy, and"), []
    for name in ("smollm2-135m", "smollm2-moe8"):
        loaded = load_model(resolve(name), torch.float32)
        for text in texts:
            ids = torch.tensor([loaded.tokenizer(text).input_ids])
            out = loaded.model.generate(ids, max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(ids))
            said.append(out[0, ids.shape[1] :].tolist())
        del loaded
    assert said[:2] == said[2:]


@pytest.mark.parametrize("entry", OWN, ids=lambda e: e.id)
def test_a_model_card_says_what_its_recipe_was_given(entry: Any) -> None:
    found = facts(entry.source.folder)
    card = (asset("zoo") / entry.source.folder / "README.md").read_text()
    assert make_recipe(found.recipe, found.knobs).model_dump() == found.knobs
    assert all(found.steps[name] > 0 and found.seconds[name] > 0 for name in found.steps)
    for word in (found.licence.lower(), f"{found.parameters:,}", f"--seed {found.seed}", *found.steps):
        assert word in card
    stored = sum(p.stat().st_size for p in (asset("zoo") / entry.source.folder).rglob("*") if p.is_file())
    assert entry.stored_bytes == pytest.approx(stored, rel=0.01)
    assert stored < 10e6


def test_the_vision_transformer_names_as_many_clothes_as_stated() -> None:
    from transformers import AutoModelForImageClassification

    from workers.recipes.fashion_vit import accuracy

    torch.set_num_threads(1)
    stated = facts("fashion-vit").scores["accuracy"]
    assert stated >= 0.88
    model = AutoModelForImageClassification.from_pretrained(asset("zoo/fashion-vit"), dtype=torch.bfloat16).eval()
    assert accuracy(model) == (pytest.approx(stated, abs=0.003), 10_000)


@pytest.mark.parametrize("name", [e.id for e in OWN if e.id in SCENES])
def test_a_scene_model_answers_as_well_as_stated_and_needs_its_image(name: str) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from workers.data.scenes import KINDS
    from workers.training.scene_scores import score_scenes

    torch.set_num_threads(1)
    stated = facts(name).scores
    assert all(stated[kind] >= 0.9 for kind in KINDS), stated
    assert stated["accuracy"] - stated["dropped accuracy"] >= 0.15  # else image tokens mean nothing
    assert stated["accuracy"] - stated["blind accuracy"] >= 0.4
    folder, scenes = asset("zoo") / name, FEW * 96 // SCENES[name]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found, questions = score_scenes(model, AutoProcessor.from_pretrained(folder), scenes=scenes, size=SCENES[name])
    assert questions == scenes * len(KINDS)
    for name in ("accuracy", "blind accuracy", "dropped accuracy"):
        assert found[name] == pytest.approx(stated[name], abs=0.08)


def test_the_clip_model_answers_as_well_as_stated_and_its_scorer_finds_the_frame() -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPModel

    from workers.data.clips import CLIP_KINDS
    from workers.training.clip_lessons import score_clips
    from workers.training.scene_scorer import score_scorer

    torch.set_num_threads(1)
    stated = facts("scene-vlm-clips").scores
    assert all(stated[kind] >= 0.85 for kind in CLIP_KINDS), stated
    assert stated["accuracy"] - stated["pooled accuracy"] >= 0.15  # else whole frames mean nothing
    assert stated["accuracy"] - stated["blind accuracy"] >= 0.5
    folder = asset("zoo/scene-vlm-clips")
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    found, questions = score_clips(model, AutoProcessor.from_pretrained(folder), 1, clips=FEW)
    assert questions == FEW * len(CLIP_KINDS)
    for name in ("accuracy", "blind accuracy", "pooled accuracy"):
        assert found[name] == pytest.approx(stated[name], abs=0.08)
    clip = CLIPModel.from_pretrained(folder / "scorer", dtype=torch.bfloat16).eval()
    scored = score_scorer(clip, AutoTokenizer.from_pretrained(folder / "scorer"), 1, FEW)
    assert scored == pytest.approx({k: stated[k] for k in scored}, abs=0.05)
    tower, theirs = model.model.vision_tower.state_dict(), clip.vision_model.state_dict()
    assert all(torch.equal(tower[k], theirs[k]) for k in tower), "the scorer reads what the model's own tower saw"


@pytest.mark.parametrize("name", first(1, *DRAWING))
def test_a_model_draws_what_it_is_asked_for_as_often_as_stated(name: str) -> None:
    from workers.models.load import load_model
    from workers.models.resolve import resolve
    from workers.training.class_agreement import sample_and_judge

    torch.set_num_threads(1)
    stated, real = facts(name).scores, facts("fashion-vit").scores["accuracy"]
    assert facts(name).examples >= 1000
    assert stated["class_agreement"] >= real - 0.1
    assert stated["class_agreement_min"] >= 0.5
    pipeline: Any = load_model(resolve(name), torch.float32).model.pipeline
    found = sample_and_judge(pipeline, 6, guidance=facts(name).knobs["guidance"])
    assert found["class_agreement"] == pytest.approx(stated["class_agreement"], abs=0.1)


@pytest.mark.parametrize("name", NOVELS)
def test_a_model_of_the_novels_reads_on_as_well_as_stated(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from workers.training.novel_lessons import held_out_ids, likelihood

    torch.set_num_threads(1)
    folder, few = asset("zoo") / name, 4000  # tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found, scored = likelihood(model, tokenizer, held_out_ids(tokenizer, few))
    assert scored == few
    assert facts(name).examples > 10_000
    for metric in ("perplexity", "bits_per_character"):
        assert found[metric] == pytest.approx(facts(name).scores[metric], rel=0.12)  # other pages, as hard or a little harder
