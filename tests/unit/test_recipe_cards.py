"""Recipes in the catalogue: in the lists and the library, never where policies are meant."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.cli_spec import recipe_request
from app.components.pipeline_editor import palette
from app.context import Context
from app.library import method_page, no_runs, shelf
from app.run_service import fits
from app.views.library import try_link
from studio_state.catalog import Catalog
from studio_state.errors import SpecError
from studio_state.pipeline import parse_pipeline
from studio_state.problems import pipeline_problems

CATALOG = Catalog.load()
RECIPES = {c.id for c in CATALOG.recipes}


def sentences(recipe: str, *knobs: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        recipe_request(recipe, knobs, CATALOG)
    return [p.sentence() for p in caught.value.problems]


def test_the_catalogue_lists_recipes_behind_the_policies() -> None:
    assert {"fashion-vit", "scene-vlm"} <= RECIPES
    assert all((c.kind, c.stage, c.resources) == ("recipe", None, ()) for c in CATALOG.recipes)
    assert all(c.summary and c.doc and c.paper and c.knobs["properties"] for c in CATALOG.recipes)
    assert [*CATALOG.policies, *CATALOG.analyzers, *CATALOG.recipes] == CATALOG.methods
    assert [c.id for c in CATALOG.analyzers] == ["llm-viewer", "roofline-order", "runtime-dissection"]
    assert len(CATALOG.by_id) == len(CATALOG.methods)


def test_no_recipe_where_policies_are_meant() -> None:
    assert not RECIPES & {c["id"] for c in palette(CATALOG)["cards"]}
    asked = SimpleNamespace(catalog=CATALOG, models=SimpleNamespace(known=lambda m: None), unavailable=lambda d: {})
    assert not RECIPES & set(fits(cast(Context, asked), "m", "", "cpu"))
    found = pipeline_problems(parse_pipeline("fashion-vit"), CATALOG)
    assert [p.message.split(";")[0] for p in found] == ["there is no policy 'fashion-vit'"]
    assert not any(name in found[0].message.partition("allowed:")[2] for name in RECIPES)


def test_a_recipe_in_the_library() -> None:
    groups = {m["id"]: m["group"] for m in shelf(CATALOG)}
    assert {groups[r] for r in RECIPES} == {"recipe"}
    card = CATALOG.by_id["fashion-vit"]
    page: dict[str, Any] = method_page(card, CATALOG, {})
    assert json.loads(json.dumps(page)) == page
    assert (page["kind"], page["stage"], page["moves"], page["conflicts"]) == ("recipe", None, [], [])
    assert ["Command", "pareto-studio train fashion-vit --out DIR"] in page["facts"]
    assert "pareto-studio train fashion-vit" in no_runs(card)["summary"]
    assert try_link(cast(Context, SimpleNamespace(catalog=CATALOG, store=None, devices=("cpu",))), card) == ""


def test_knobs_of_a_recipe_from_words() -> None:
    card, values = recipe_request("fashion-vit", ["steps=6", "learning_rate=1e-3", "data=/some/folder"], CATALOG)
    assert (card.id, values) == ("fashion-vit", {"steps": 6, "learning_rate": 0.001, "data": "/some/folder"})


def test_what_is_wrong_with_a_recipe_is_told_at_once() -> None:
    assert sentences("fashion-vti")[0].startswith("there is no recipe 'fashion-vti'; did you mean 'fashion-vit'? allowed: ")
    assert "there is no recipe 'rtn'" in sentences("rtn")[0]
    assert sentences("fashion-vit", "steps") == ["cannot read --knob 'steps': write name=value, for example --knob steps=1000"]
    assert sentences("fashion-vit", "steps=0", "stesp=3", "width=40") == [
        f"fashion-vit has no knob 'stesp'; did you mean 'steps'? allowed: {', '.join(CATALOG.by_id['fashion-vit'].defaults())}",
        "fashion-vit: steps = 0 is not allowed; allowed: a whole number from 1 to 1000000",
        "fashion-vit: width = 40 is not allowed; allowed: a whole number divisible by 32 from 32 to 1024",
    ]
