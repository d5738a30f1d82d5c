"""What the screen is told of images: tokens kept and merged, levels, bars, and a grid that sends every picture once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app import race_gallery, race_images, race_outputs
from app.live import Races, Viewer, Visitor
from app.race import Race
from studio_state import events as ev
from tests.ui import pictured


def race_of(events: Any, until: int | None = None) -> Race:
    race = Race("x")
    race.feed([e.model_copy(update={"experiment": "x", "seq": i, "t": 100.0 + i}) for i, e in enumerate(events)][:until])
    return race


@pytest.mark.parametrize(
    ("tokens", "views", "text"),
    [
        ({"share": [1.0] * 29 + [0.0] * 115}, [], "29 of 144 image tokens kept"),
        ({"share": [1.0, 0.08, 0.08]}, [], "1 of 3 image tokens kept, 2 dropped after 8 % of the layers"),
        ({"share": [1.0, 0.25, 0.5, 0.0]}, [], "1 of 4 image tokens kept, 2 dropped after 25 % to 50 % of the layers"),
        ({"share": [1.0, 0.0, 1.0]}, [0, 0, 1], "2 of 3 image tokens kept (whole image 1 of 2, tiles 1 of 1)"),
        ({"share": [1.0] * 50, "group": [i % 21 for i in range(50)]}, [], "50 tokens merged into 21"),
        ({"share": [1.0, 1.0, 0.0, 1.0], "group": [0, 0, -1, 3]}, [], "3 tokens merged into 2, 1 dropped"),
        ({"share": [1.0] * 4, "group": [0, 0, -1, 3]}, [], "3 tokens merged into 2"),  # a line break between tiles
        ({"share": [1.0, 1.0], "group": [0, 1]}, [], "2 of 2 image tokens kept"),
    ],
)
def test_captions(tokens: dict[str, Any], views: list[int], text: str) -> None:
    assert race_images.caption(ev.ImageTokens(lane=1, item="a", **tokens), views) == text


def test_the_lane_s_own_keep_is_the_highest_level_that_it_kept() -> None:
    def own(share: list[float], level: list[float]) -> float | None:
        return race_images.own_keep(ev.ImageTokens(lane=1, item="a", share=share, level=level))

    assert own([1.0, 0.3, 1.0, 0.0], [0.1, 0.5, 0.25, 2.0]) == 0.25
    assert own([1.0, 1.0], [0.5, 2.0]) == 0.5  # 2 = at no keep
    assert own([0.5, 0.5], [0.1, 0.5]) == 1.0
    assert own([1.0], []) is None


@pytest.mark.parametrize(
    "prompt",
    [
        pictured.PROMPT,
        "USER: <image>\nWhere is the bright square? ASSISTANT:",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
        "Where is the bright square?<|im_end|>\n<|im_start|>assistant\n",
        "Where is the bright square?",
    ],
)
def test_the_question_without_the_template(prompt: str) -> None:
    assert race_images.question(prompt) == "Where is the bright square?"


def test_a_question_is_never_lost() -> None:
    assert race_images.question("What does the user: see? <3") == "What does the user: see? <3"
    assert race_images.question("<image>") == "<image>"
    assert race_images.question("") == ""


def test_only_plain_images_become_addresses() -> None:
    assert race_images.source("image/png", "QUJD") == "data:image/png;base64,QUJD"
    assert race_images.source("image/svg+xml", "QUJD") == race_images.source("text/html", "QUJD") == ""


def test_bars_mark_the_expected_class() -> None:
    out = ev.Output(
        lane=0,
        item="a",
        kind="label",
        text="Dress",
        expected="dress",
        data={"labels": ["Coat", "Dress"], "probabilities": [0.7, 0.25]},
    )
    assert race_images.bars(out) == [
        {"label": "Coat", "share": 0.7, "text": "70.0 %", "expected": False},
        {"label": "Dress", "share": 0.25, "text": "25.0 %", "expected": True},
    ]
    assert race_images.bars(out.model_copy(update={"data": {"labels": "?", "probabilities": None}})) == []
    assert race_images.bars(out.model_copy(update={"kind": "text"})) == []


def test_the_section_of_an_item() -> None:
    race = race_of(pictured.vlm())
    shown = race_images.images(race, "square")
    assert (shown["question"], shown["place"], len(shown["boxes"])) == (pictured.QUESTION, "item 1 of 2", pictured.TOKENS)
    assert [lane["caption"] for lane in shown["lanes"]] == [
        "144 of 144 image tokens kept",
        "36 of 144 image tokens kept",
        "144 tokens merged into 54",
        "36 of 144 image tokens kept, 108 dropped after 50 % of the layers",
    ]
    assert shown["lanes"][1]["own"] == 0.25
    assert race_images.images(race_of(pictured.plain()), None) == {"item": None, "lanes": []}


def test_a_picture_stays_until_something_came_of_the_next_item() -> None:
    events = list(pictured.vlm())
    begins = next(i for i, e in enumerate(events) if isinstance(e, ev.Picture) and e.item == "tiles")
    without = [e for e in events if not (isinstance(e, ev.Picture) and e.item == "tiles")]
    assert race_images.images(race_of(without, begins + 1), None)["item"] == "square"  # begun, its picture not told yet
    assert race_images.images(race_of(without, begins + 2), None)["item"] is None  # it has words and no picture
    assert race_images.images(race_of(without), "tiles")["item"] is None  # chosen, without a picture


def test_short_answers_are_compared_in_words() -> None:
    lanes = race_outputs.streams(race_of(pictured.vlm()), "square")["lanes"]
    assert [(lane["short"], lane["note"]) for lane in lanes] == [
        (True, ""),
        (True, "same as baseline"),
        (True, "differs from baseline"),
        (True, "same as baseline"),
    ]
    assert lanes[2]["runs"] == [("top right", "removed"), ("bottom", "added")]
    without = race_outputs.streams(race_of(pictured.plain()), None)["lanes"]
    assert [(lane["short"], lane["note"]) for lane in without] == [(False, ""), (False, "all 2 tokens equal")]


def test_the_grid_sends_pictures_once_and_marks_as_they_come() -> None:
    events = list(pictured.classes(6))
    sources: list[str] = []
    states: dict[str, list[str]] = {}
    upto = -1
    for n in range(1, len(events) + 1, 3):
        news = race_gallery.gallery(race_of(events, n), upto)
        upto = news["upto"]
        sources += [row["id"] for row in news["rows"] if "src" in row]
        states |= {row["id"]: row["states"] for row in news["rows"]}
    whole = race_gallery.gallery(race_of(events), -1)
    assert sources == [f"test-{i}" for i in range(6)]
    assert states == {row["id"]: row["states"] for row in whole["rows"]}
    assert states["test-5"] == ["wrong", "wrong"]
    assert whole["rows"][5]["label"] == "Item 6: Baseline wrong; Half the patches wrong"
    assert race_gallery.gallery(race_of(events), whole["upto"])["rows"] == []


def test_many_pictures_come_in_portions_the_chosen_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    race = race_of(pictured.classes(30))
    monkeypatch.setattr(race_gallery, "AT_ONCE", 10 * max(len(i.picture.data) for i in race.items.values() if i.picture))
    upto, ahead, portions = -1, set[str](), []
    while upto < race.seq:
        news = race_gallery.gallery(race, upto, "test-29", ahead)
        portion = [row["id"] for row in news["rows"] if "src" in row]
        assert (("test-29" in portion) and "test-28" not in portion) == (not portions)
        ahead |= set(portion)
        upto = news["upto"]
        portions.append(portion)
    assert len(portions) >= 3
    assert sorted(x for p in portions for x in p) == sorted(f"test-{i}" for i in range(30))


def test_a_page_gets_each_picture_once_and_a_new_connection_goes_on_where_it_was() -> None:
    events = [e.model_copy(update={"experiment": "x", "seq": i}) for i, e in enumerate(pictured.classes(4))]
    known = 0

    def since(experiment: str, seq: int) -> list[ev.Event]:
        return events[seq:known]

    races = Races(since, lambda _: None, list, lambda _: False)
    viewer = Viewer(races, Visitor())
    viewer.ask({"watch": "x", "item": None})
    text = ""
    for known in range(1, len(events) + 1):  # noqa: B007  (read by since)
        text += viewer.news()
    for event in events:
        if isinstance(event, ev.Picture):
            assert text.count(event.data) == 1
    again = Viewer(races, Visitor())
    again.ask({"watch": "x", "item": None, "seen": viewer.seen})
    assert "pictures" not in json.loads(again.news())
    again.ask({"watch": "x", "item": "test-1"})
    assert json.loads(again.news())["images"]["item"] == "test-1"
    anew = Viewer(races, Visitor())
    anew.ask({"watch": "x", "item": None, "seen": "no number"})
    assert len(json.loads(anew.news())["pictures"]["rows"]) == 4
