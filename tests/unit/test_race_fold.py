"""The fold behind the live page: what stands after which events, differences of outputs, time left, numbers as text."""

from __future__ import annotations

import math

import pytest

from app import race_charts, race_outputs, race_view
from app.components.numbers import byte_quantity, clock, interval_text, metric_quantity, ratio_text, seconds_quantity
from app.race import Race
from app.race_diff import diff
from app.race_parts import Stream
from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.metrics import METRICS
from studio_state.pipeline import parse_pipeline
from studio_state.results import results_of

SPEC = ExperimentSpec(model="m", workload=WorkloadSpec(id="prompts"), lanes=(parse_pipeline("snapkv:keep=0.5"),))


def numbered(*events: ev.Event) -> list[ev.Event]:
    return [e.model_copy(update={"experiment": "x", "seq": i, "t": 100.0 + i}) for i, e in enumerate(events)]


def two_items() -> list[ev.Event]:
    """Baseline then lane 1 on item a; both begin item b, only the baseline ends it."""
    out: list[ev.Event] = [ev.Submitted(spec=SPEC), ev.Started()]
    for lane, item, index in ((0, "a", 0), (1, "a", 0), (0, "b", 1), (1, "b", 1)):
        out.append(ev.ItemStarted(lane=lane, item=item, index=index, of=2, pieces=["Hi", " you"]))
        out.append(ev.Tokens(lane=lane, item=item, ids=[1, 2], text="one two", at=[0.5, 0.75]))
        out.append(ev.Metric(lane=lane, item=item, name="decode_tokens_per_s", value=10.0 * (index + 1) * (lane + 1)))
        if (lane, item) != (1, "b"):
            out.append(ev.Output(lane=lane, item=item, text="one two"))
    return numbered(*out)


def test_events_may_come_in_any_portions_and_twice() -> None:
    events = two_items()
    at_once, piecewise = Race("x"), Race("x")
    assert at_once.feed(events)
    for i in range(len(events)):
        piecewise.feed(events[max(0, i - 3) : i + 1])
    assert piecewise == at_once
    assert not at_once.feed(events)


def test_progress_and_time_left() -> None:
    race = Race("x")
    race.feed(two_items())
    assert race.progress() == 3 / 4
    assert (race.first_item_at, race.last_done_at) == (102.0, 113.0)
    rest = (113 - 102) * (1 / 4) / (3 / 4)
    assert race.eta(113.0) == pytest.approx(rest)
    assert race.eta(114.0) == pytest.approx(rest - 1)
    assert race.eta(1000.0) == pytest.approx(rest / 10)
    race.feed([ev.Finished(experiment="x", seq=99)])
    assert race.over
    assert race.eta(115.0) is None


def test_values_are_summarized_as_the_metric_says_until_the_final_one_comes() -> None:
    race = Race("x")
    race.feed(two_items())
    assert race.lanes[1].value("decode_tokens_per_s") == 30.0  # median of 20 and 40
    race.feed([ev.Metric(experiment="x", seq=50, lane=1, name="decode_tokens_per_s", value=33.0)])
    assert race.lanes[1].value("decode_tokens_per_s") == 33.0


def test_a_race_that_nobody_runs_any_more_is_over() -> None:
    race = Race("x")
    race.feed(two_items())
    race.interrupt()
    assert (race.status, race.over, race.ended_at) == ("interrupted", True, 113.0)
    assert race_view.head(race, 500.0)["text"] == "Interrupted"


def test_a_race_says_what_a_lane_does_and_the_record_only_how_it_ended() -> None:
    begun = numbered(ev.Submitted(spec=SPEC), ev.Started(), ev.LaneStarted(lane=0, order="baseline"))
    race = Race()
    race.feed(begun)
    assert (race.experiment, [lane.status for lane in race.lanes]) == ("x", ["running", "waiting"])
    end = ev.Cancelled(experiment="x", seq=9)
    race.feed([end])
    assert [lane.status for lane in race.lanes] == ["cancelled", "cancelled"]
    assert [lane.status for lane in results_of([*begun, end]).lanes] == ["not finished", "not finished"]


def stream(*pieces: tuple[tuple[int, ...], str], done: bool = True) -> Stream:
    return Stream([ids for ids, _ in pieces], [text for _, text in pieces], [], ev.Output(lane=0, item="a") if done else None)


def test_differences_of_finished_outputs() -> None:
    base = stream(((1,), "The "), ((2,), "red "), ((3,), "fox "), ((4,), "ran"))
    lane = stream(((1,), "The "), ((9,), "grey "), ((3,), "fox "), ((4,), "ran"))
    assert diff(lane, base) == ([("The ", "same"), ("red ", "removed"), ("grey ", "added"), ("fox ran", "same")], 3, 4, 1)
    assert diff(base, base) == ([("The red fox ran", "same")], 4, 4, None)
    shorter = stream(((1,), "The "), ((2,), "red "))
    assert diff(shorter, base) == ([("The red ", "same"), ("fox ran", "removed")], 2, 4, 2)


def test_differences_while_the_output_grows() -> None:
    base = stream(((1,), "a"), ((2,), "b"), ((3,), "c"))
    assert diff(stream(((1,), "a"), ((2,), "b"), done=False), base).first is None
    assert diff(stream(((1,), "a"), ((7,), "x"), ((3,), "c"), done=False), base) == ([("a", "same"), ("xc", "added")], 1, 3, 1)
    ahead = diff(stream(((1,), "a"), ((2,), "b"), ((3,), "c"), ((4,), "d"), done=False), stream(((1,), "a"), done=False))
    assert ahead.runs == [("abcd", "same")]


def test_a_piece_of_several_tokens_is_one_piece() -> None:
    base = stream(((1, 2), "ab"), ((3,), "c"))
    lane = stream(((1,), "a"), ((2, 3), "bc"))
    assert diff(lane, base) == ([("abc", "same")], 3, 3, None)


def test_a_column_shows_the_lane_s_own_latest_item() -> None:
    race = Race("x")
    race.feed([e for e in two_items() if not (e.event == "item" and e.lane == 1 and e.item == "b")][:11])  # type: ignore[attr-defined]
    shown = race_outputs.streams(race, None)["lanes"]
    assert [lane["earlier"] for lane in shown] == ["", "item 1"]


def test_verdicts_follow_the_metric_and_the_interval() -> None:
    def of(name: str, value: float, low: float, high: float) -> str:
        return race_view.verdict(name, ev.Ratio(lane=1, name=name, value=value, low=low, high=high))

    assert of("decode_tokens_per_s", 1.4, 1.3, 1.5) == "better"
    assert of("decode_tokens_per_s", 0.8, 0.7, 0.9) == "worse"
    assert of("ttft_s", 0.8, 0.7, 0.9) == "better"
    assert of("ttft_s", 1.1, 0.9, 1.3) == "no clear difference"
    assert of("weight_bytes", 1.0, 1.0, 1.0) == "same"
    assert of("prompt_tokens", 2.0, 2.0, 2.0) == ""


def test_every_chart_has_a_sentence_and_a_table_that_fits() -> None:
    race = Race("x")
    race.feed(two_items())
    race.feed([ev.Ratio(experiment="x", seq=60, lane=1, name="decode_tokens_per_s", value=2.0, low=1.9, high=2.1, n=2)])
    found = race_charts.charts(race, None)
    assert [c["id"] for c in found] == ["race", "items", "ratios"]
    for chart in found:
        assert chart["summary"].endswith(".")
        assert chart["table"]["rows"]
        assert {len(r) for r in chart["table"]["rows"]} == {len(chart["table"]["head"])}


def test_long_lines_are_thinned_with_their_ends() -> None:
    points = [(float(i), float(i)) for i in range(1000)]
    thin = race_charts.thin(points, 100)
    assert (len(thin), thin[0], thin[-1]) == (100, points[0], points[-1])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("decode_tokens_per_s", 54.321, "54.3 tokens/s"),
        ("decode_tokens_per_s", 1234.5, "1,234 tokens/s"),
        ("ttft_s", 0.0382, "38.2 ms"),
        ("ttft_s", 1.2345, "1.23 s"),
        ("end_to_end_s", 125.0, "2 min 05 s"),
        ("weight_bytes", 538_060_032.0, "538 MB"),
        ("kv_bytes", 999_700.0, "1.00 MB"),
        ("accuracy", 0.5, "50.0 %"),
        ("perplexity", 17.456, "17.5"),
        ("kl_to_baseline", 0.000674, "0.000674 nats"),
        ("kl_to_baseline", 0.0, "0 nats"),
        ("kept_prompt_tokens", 271.0, "271 tokens"),
        ("accuracy", None, "–"),
        ("accuracy", math.nan, "–"),
    ],
)
def test_numbers_as_text(name: str, value: float | None, text: str) -> None:
    assert str(metric_quantity(name, value)) == text


def test_small_formats() -> None:
    assert (ratio_text(1.336), ratio_text(12.34), ratio_text(0.056), ratio_text(None)) == ("1.34×", "12.3×", "0.0560×", "–")
    assert (interval_text(1.305, 1.371), interval_text(None, 1.0)) == ("1.30 to 1.37", "")
    assert interval_text(0.000287, 834.0) == "too few items to tell"
    assert (clock(8.2), clock(185), clock(7800)) == ("8 s", "3 min 05 s", "2 h 10 min")
    assert (str(byte_quantity(512)), str(byte_quantity(0)), str(seconds_quantity(0.0))) == ("512 B", "0 B", "0 s")


def test_every_metric_can_be_written() -> None:
    for name in METRICS:
        for value in (0.0, 1.0, 123456789.0, 1e-7, -3.0):
            assert str(metric_quantity(name, value))
