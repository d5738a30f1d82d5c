"""Pictures that lanes draw: the fold keeps one look at each, the page is sent every picture once, words say what is in the record."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from app import race_charts, race_drawn, race_gallery, race_outputs, race_view
from app.components.numbers import metric_quantity
from app.dispatch.bus import Bus
from app.live import Races, Viewer, Visitor
from app.race import Race
from studio_state import events as ev
from studio_state.paths import DataDir
from studio_state.store import Store
from tests.ui import drawn
from tests.ui.pictured import record


def numbered(events: Any) -> list[ev.Event]:
    return [e.model_copy(update={"experiment": "x", "seq": i, "t": 100.0 + i}) for i, e in enumerate(events)]


def race_of(events: Any, until: int | None = None) -> Race:
    race = Race("x")
    race.feed(numbered(events)[:until])
    return race


def looks(race: Race) -> list[tuple[int, str, int]]:
    return [(lane, i.id, s.preview.step) for i in race.items.values() for lane, s in i.streams.items() if s.preview]


def test_only_the_newest_look_is_kept_and_none_once_the_picture_is_there() -> None:
    race, most = Race("x"), 0
    for event in numbered(drawn.drawn()):
        race.feed([event])
        most = max(most, len(looks(race)))
        if isinstance(event, ev.Preview):
            assert (event.lane, event.item, event.step) in looks(race)
        if isinstance(event, ev.Output):
            assert not any((lane, item) == (event.lane, event.item) for lane, item, _ in looks(race))
    assert most == 1
    assert looks(race) == []


def test_a_repeat_does_not_bring_looks_back() -> None:
    race = race_of(drawn.drawn())
    seq = race.seq + 1
    race.feed([ev.ItemStarted(experiment="x", seq=seq, lane=1, item="picture-0", of=6, repeat=1)])
    race.feed([ev.Preview(experiment="x", seq=seq + 1, lane=1, item="picture-0", repeat=1, step=2, of=20, data="QUJD")])
    assert looks(race) == []
    assert race.items["picture-0"].streams[1].outcome is not None


def test_the_bus_holds_one_look_at_a_picture(tmp_path: Any) -> None:
    bus, events = Bus(DataDir.at(tmp_path, tmp_path / "cache")), numbered(drawn.drawn())
    for at in range(0, len(events), 7):
        bus.publish(events[at : at + 7])
    held = bus.since("x")
    assert [e.seq for e in held] == [e.seq for e in events]
    assert [e for e in held if isinstance(e, ev.Preview) and e.data] == []
    assert [e for e in held if not isinstance(e, ev.Preview)] == [e for e in events if not isinstance(e, ev.Preview)]
    half = next(i for i, e in enumerate(events) if isinstance(e, ev.Preview) and e.step == 8)
    bus = Bus(DataDir.at(tmp_path, tmp_path / "cache"))
    bus.publish(events[: half + 1])
    assert [e.step for e in bus.since("x") if isinstance(e, ev.Preview) and e.data] == [8]
    race = Race("x")
    race.feed(bus.since("x"))
    assert looks(race) == [(0, "picture-0", 8)]


def test_the_store_takes_looks_and_keeps_no_row_of_them(tmp_path: Any) -> None:
    data = DataDir.at(tmp_path, tmp_path / "cache").open()
    record(data.spools, drawn.DRAWN, drawn.drawn())
    with Store(data) as store:
        store.flush()
        tables = ("metrics", "outputs", "ratios", "runs", "messages", "kept")
        counts = {t: len(store.table(t)) for t in tables}
    events = list(drawn.drawn())
    assert counts == {
        "metrics": sum(isinstance(e, ev.Metric) for e in events),
        "outputs": 3 * drawn.ITEMS,
        "ratios": 4,
        "runs": 3,
        "messages": 0,
        "kept": 0,
    }


def test_a_column_says_how_far_a_picture_is_and_then_what_is_seen_in_it() -> None:
    events = list(drawn.drawn())
    at = next(i for i, e in enumerate(events) if isinstance(e, ev.Preview) and e.step == 8)
    shown = race_outputs.streams(race_of(events, at + 1), None)
    assert (shown["drawing"], shown["place"], shown["prompt"]) == (True, "item 1 of 6", drawn.right_class(0))
    assert shown["lanes"][0]["drawn"] == {"state": "drawing", "text": "step 8 of 20", "done": 0.4}
    assert shown["lanes"][1]["drawn"]["state"] == "waiting"
    done = race_outputs.streams(race_of(events), "picture-5")["lanes"]
    assert [lane["drawn"]["correct"] for lane in done] == [True, True, False]
    assert done[2]["drawn"]["text"] == f"sees {drawn.said(2, 5)} (87 %)"
    assert done[2]["drawn"]["expected"] == drawn.right_class(5)


def test_a_picture_that_was_never_finished() -> None:
    race = race_of(drawn.stopped())
    assert [lane["drawn"] for lane in race_outputs.streams(race, "picture-1")["lanes"]][1] == {
        "state": "stopped",
        "text": "stopped at step 7 of 20",
        "done": 0.35,
    }
    assert race_drawn.drawn(race, None)["item"] == "picture-0"  # both lanes have drawn it
    assert race_drawn.drawn(race, "picture-1")["lanes"][1]["state"] == "stopped"
    assert race_drawn.drawn(race, None)["lanes"][1]["text"] == ""  # nobody judges
    assert race_drawn.drawn(race, None)["lanes"][1]["distance"] == "PSNR 21.4 dB, SSIM 0.813"


def test_distances_are_those_of_the_record() -> None:
    race = race_of(drawn.drawn())
    rows = race_gallery.gallery(race, -1)["rows"]
    for index, row in enumerate(rows):
        for lane in (1, 2):
            away = drawn.psnr(lane, index)
            cell = row["lanes"][lane]
            assert cell["equal"] == (away is None)
            assert cell["psnr"] == ("" if away is None else str(metric_quantity("psnr", away)))
            assert cell["ssim"] == str(metric_quantity("ssim", drawn.ssim(lane, index)))
            assert cell["rank"] == drawn.ssim(lane, index)
        assert row["lanes"][0]["psnr"] == row["lanes"][0]["ssim"] == ""
    assert rows[0]["label"].startswith(
        "Item 1, T-shirt/top: Baseline sees T-shirt/top (87 %), right; "
        "Every third step sees T-shirt/top (87 %), right, equal to the baseline's; Half the steps sees"
    )
    assert "wrong" in rows[5]["label"]
    assert "differs from baseline" in rows[5]["label"]


def test_every_picture_and_every_newest_look_is_sent_once() -> None:
    events, known = numbered(drawn.drawn()), 0

    def since(experiment: str, seq: int) -> list[ev.Event]:
        return events[seq:known]

    races = Races(since, lambda _: None, list, lambda _: False)
    viewer, text = Viewer(races, Visitor()), ""
    viewer.ask({"watch": "x", "item": None})
    for known in range(1, len(events) + 1):  # noqa: B007  (read by since)
        text += viewer.news()
    for event in events:
        if isinstance(event, ev.Preview):
            assert text.count(event.data) == sum(isinstance(e, ev.Preview) and e.data == event.data for e in events)
    for index in range(drawn.ITEMS):
        for lane in range(3):
            data = drawn.png(drawn.picture(lane, index))
            twins = sum(drawn.png(drawn.picture(other, index)) == data for other in range(3))
            assert text.count(data) == twins
    again = Viewer(races, Visitor())
    again.ask({"watch": "x", "item": None, "seen": viewer.seen})
    assert "pictures" not in json.loads(again.news())
    late = Viewer(races, Visitor())
    late.ask({"watch": "x", "item": None})
    found = json.loads(late.news())["pictures"]["rows"]
    assert [sorted(row["drawn"]) for row in found] == [["0", "1", "2"]] * drawn.ITEMS
    assert all(row["previews"] == {} for row in found)


def test_distances_that_come_after_the_picture_change_its_tile() -> None:
    events = list(drawn.drawn())
    first = next(i for i, e in enumerate(events) if isinstance(e, ev.Metric) and e.name == "ssim")
    before = race_gallery.gallery(race_of(events, first), -1)
    assert before["rows"][0]["lanes"][2]["ssim"] == ""
    after = race_gallery.gallery(race_of(events, first + 8), before["upto"])
    assert [row["id"] for row in after["rows"]] == ["picture-0"]
    assert after["rows"][0]["drawn"] == {}
    assert after["rows"][0]["lanes"][2]["ssim"] != ""


def test_many_pictures_come_in_portions_the_chosen_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    race = race_of(drawn.drawn(12))
    monkeypatch.setattr(race_gallery, "AT_ONCE", 3000)
    upto, ahead, sent = -1, set[str](), list[str]()
    while upto < race.seq:
        news = race_gallery.gallery(race, upto, "picture-11", ahead)
        keys = {key for row in news["rows"] for key in race_gallery.keys_of(row)}
        if not sent:
            assert {f"picture-11/{lane}" for lane in range(3)} <= keys
        ahead |= keys
        sent += keys
        upto = news["upto"]
    assert sorted(sent) == sorted(f"picture-{i}/{lane}" for i in range(12) for lane in range(3))


@pytest.mark.parametrize(
    ("reused", "text", "words"),
    [
        (
            [0.0, 0.5, 0.5, 0.0],
            "2 of 4 steps reused work, 50 % of it",
            "step 1 computed, steps 2 to 3 reused 50 %, step 4 computed",
        ),
        ([0, 1, 1], "2 of 3 steps reused work", "step 1 computed, steps 2 to 3 reused 100 %"),
        (
            [0.0, 0.25, 0.75],
            "2 of 3 steps reused work, 25 to 75 % of it",
            "step 1 computed, step 2 reused 25 %, step 3 reused 75 %",
        ),
        ([0.0, 7.0], "1 of 2 steps reused work", "step 1 computed, step 2 reused 100 %"),
    ],
)
def test_the_trace_in_words(reused: list[float], text: str, words: str) -> None:
    found = race_drawn.trace(reused)
    assert found is not None
    assert (found["text"], found["words"]) == (text, words)


@pytest.mark.parametrize("reused", [None, [], [0.0, 0.0], "0.5", ["a"], {"1": 0.5}])
def test_no_trace_where_nothing_was_reused(reused: Any) -> None:
    assert race_drawn.trace(reused) is None


def test_lanes_that_reuse_nothing_have_no_trace() -> None:
    lanes = race_drawn.drawn(race_of(drawn.drawn()), "picture-2")["lanes"]
    assert [lane["trace"] is not None for lane in lanes] == [False, True, False]
    assert lanes[1]["trace"]["text"] == "13 of 20 steps reused work, 87 % of it"
    assert lanes[1]["trace"]["shares"] == drawn.REUSED


def test_races_that_draw_nothing_show_nothing_of_it() -> None:
    from tests.ui import pictured

    race = race_of(pictured.maps())
    assert race_drawn.drawn(race, None) == {"item": None, "lanes": []}
    assert race_outputs.streams(race, None)["drawing"] is False
    assert "drawn" not in race_gallery.gallery(race, -1)["rows"][0]


def test_the_numbers_of_a_column_and_of_the_charts() -> None:
    race = race_of(drawn.drawn())
    columns = race_view.lanes(race)
    names = [row["name"] for row in columns[1]["rows"]]
    assert names == [
        "seconds_per_image",
        "denoising_steps_per_s",
        "denoiser_calls",
        "class_agreement",
        "psnr",
        "ssim",
        "same_output",
    ]
    assert columns[1]["now"]["unit"] == "ms per picture"
    values = sorted(v for v in (drawn.psnr(1, i) for i in range(drawn.ITEMS)) if v is not None)
    assert race.lanes[1].value("psnr") == pytest.approx(math.fsum(values) / len(values))
    begun = race_view.lanes(race_of(drawn.drawn(), 8))
    assert begun[1]["now"] == {"text": "–", "unit": "s per picture", "when": ""}
    titles = {c["id"]: c["title"] for c in race_charts.charts(race, None)}
    assert titles["items"] == "Time per picture item by item"
    assert "image speed 1.71×" in next(c["summary"] for c in race_charts.charts(race, None) if c["id"] == "ratios")
