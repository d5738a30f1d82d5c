"""Expert load on the screen: which experts carry the tokens, in numbers and in words."""

from __future__ import annotations

import pytest

from app import race_experts
from app.race import Race
from studio_state import events as ev
from tests.ui.experts import EVEN, FEWER, LOADS, MILD, STEEP, experts


def race_of(until: int | None = None) -> Race:
    race = Race("x")
    race.feed([e.model_copy(update={"experiment": "x", "seq": i}) for i, e in enumerate(experts())][:until])
    return race


@pytest.mark.parametrize(
    ("shares", "few"),
    [(EVEN, 8), (STEEP, 4), (MILD, 7), (FEWER, 5), ([1.0, 0.0], 1), ([0.9, 0.1], 1), ([0.0, 0.0], 0), ([0.3, 0.3, 0.3], 3)],
)
def test_the_fewest_experts_that_carry_nine_tenths(shares: list[float], few: int) -> None:
    assert race_experts.carry(shares) == few  # counted by hand


def test_the_section_of_an_item() -> None:
    found = race_experts.experts(race_of(), "a")
    assert (found["item"], found["place"], found["most"], found["scale"]) == ("a", "item 1 of 2", 5000, 10_000)
    base = found["lanes"][0]
    assert [layer["layer"] for layer in base["layers"]] == [2, 3, 4]
    assert [layer["carry"] for layer in base["layers"]] == [8, 4, 7]
    assert base["layers"][1]["shares"] == [5000, 2500, 1000, 600, 500, 400, 0, 0]
    assert base["layers"][1]["text"] == "layer 3: 4 of 8 experts carry 90 % of the tokens"
    assert base["summary"] == (
        "On average 6.33 of 8 experts carry 90 % of a layer's tokens; the least even is layer 3: 4 of 8 experts carry 90 % of "
        "the tokens. 2 of 24 experts, counted layer by layer, got no token."
    )
    assert race_experts.summary([[], STEEP]) == (
        "Layer 2: 4 of 8 experts carry 90 % of the tokens. 2 of 8 experts, counted layer by layer, got no token."
    )
    assert race_experts.summary([[], [0.0, 0.0]]) == "No token visited an expert."


def test_a_chosen_item_and_the_latest() -> None:
    events = list(experts())
    first = next(i for i, e in enumerate(events) if isinstance(e, ev.ExpertLoad))
    assert race_experts.experts(race_of(first), None) == {"item": None, "lanes": []}
    assert len(race_experts.experts(race_of(first + 1), None)["lanes"]) == 1
    begun = next(i for i, e in enumerate(events) if isinstance(e, ev.ItemStarted) and e.item == "b")
    assert race_experts.experts(race_of(begun + 1), None)["item"] == "a"  # of b nothing is told yet
    assert race_experts.experts(race_of(begun + 1), "b")["item"] is None
    assert race_experts.experts(race_of(), None)["item"] == "b"
    assert LOADS[0][0] == []
