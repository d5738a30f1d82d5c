"""The cost engine and the story it tells, by hand."""

from __future__ import annotations

import pytest

from app.explain import explained
from studio_state.catalog import Catalog
from studio_state.costs import Device, Work, amdahl, predicted_gain, total
from studio_state.events import Analysis
from studio_state.speed_story import KINDS, reached, stories

CARDS = Catalog.load().by_id
SLOW = Device(name="hand", bandwidth=10e9, peak={"float32": 100e9, "bfloat16": 200e9})


def test_the_roofline_by_hand() -> None:
    assert SLOW.ridge("float32") == 10
    assert SLOW.best("float16") == 200e9  # not listed: the highest
    narrow = Work(name="decode", flops=2e6, weight_bytes=4e6)  # half an operation a byte
    assert narrow.intensity == 0.5
    assert narrow.bound(SLOW, "float32") == "memory"
    assert narrow.seconds(SLOW, "float32") == pytest.approx(4e6 / 10e9)
    wide = Work(name="prefill", flops=400e6, weight_bytes=4e6, activation_bytes=1e6)
    assert wide.bound(SLOW, "float32") == "compute"
    assert wide.seconds(SLOW, "float32") == pytest.approx(4e-3)
    both = total((narrow, wide), "both", "maps")
    assert (both.flops, both.bytes) == (402e6, 9e6)


def test_amdahl_and_the_prediction_by_hand() -> None:
    assert amdahl(0.75) == 4
    assert amdahl(1.0) == float("inf")
    # three quarters of the step shrink to a third of their roofline time: 1 / (1/4 + 1/4)
    assert predicted_gain({"maps": 3.0}, {"maps": 0.75, "attention": 0.1}, {"maps": 1.0}) == pytest.approx(2)


def test_what_a_policy_can_reach() -> None:
    assert reached(CARDS["rtn"], {}) == ("products", "unpacking")
    assert reached(CARDS["snapkv"], {}) == ("attention",)
    assert reached(CARDS["lean-decode"], {}) == tuple(KINDS)


def test_the_story_by_hand() -> None:
    def data(seconds: float, kinds: dict[str, float], moved: float) -> dict[str, object]:
        kinds = {**dict.fromkeys(KINDS, 0.0), **kinds}
        operations = [{"name": "maps", "group": "maps", "flops": 1.0, "bytes": moved}]
        return {
            "runtime-dissection": {"phases": {"decode": {"seconds": seconds, "kinds": kinds, "steps": 8}}},
            "llm-viewer": {"phases": {"decode": {"operations": operations, "seconds": {"maps": moved / 10e9}}}},
        }

    base = data(0.010, {"products": 0.008, "attention": 0.001, "launching": 0.001}, 40e6)
    lane = data(0.008, {"products": 0.002, "unpacking": 0.004, "attention": 0.001, "launching": 0.001}, 10e6)
    (story,) = stories(base, lane, [(CARDS["rtn"], {"bits": 4})])
    assert story.gained == pytest.approx(1.25)
    assert story.reach[0].share == pytest.approx(0.8)
    assert story.reach[0].limit == pytest.approx(5)
    assert story.predicted == pytest.approx(1 / (0.2 + 0.8 / 4))
    assert story.sentences() == [
        "Round-to-nearest can touch linear maps: 80 % of the reference's step. If that took no time at all, the step would be "
        "5.00x as fast (Amdahl).",
        "A step moves 10 MB where the reference moves 40 MB (0.25x).",
        "By bytes and operations alone it would be 2.50x as fast (estimated); it is 1.25x.",
        "50 % of its step goes to unpack and round.",
        "12 % of its step goes in Python and launching.",
    ]
    assert stories({}, lane, []) == []


def test_the_terminal_says_whose_roofline_it_is() -> None:
    found = {**SLOW.model_dump(mode="json"), "source": "measured", "threads": 2, "calibrated": "2026-01-31"}
    work = {"name": "maps", "group": "maps", "flops": 1.0, "bytes": 40e6}
    timed = {"seconds": 0.01, "kinds": {**dict.fromkeys(KINDS, 0.0), "products": 0.01}, "steps": 8}
    events = [
        Analysis(lane=lane, analyzer=name, data=data)
        for lane in (0, 1)
        for name, data in (
            ("runtime-dissection", {"phases": {"decode": timed}}),
            ("llm-viewer", {"phases": {"decode": {"operations": [work], "seconds": {"maps": 4e-3}}}, "device": found}),
        )
    ]
    spec = {"reference": 0, "lanes": [{}, {"steps": [{"policy": "rtn", "knobs": {"bits": 4}}]}]}
    lines = explained({"experiment": {"spec": spec}}, events)
    assert lines[0].startswith("lane 1, a decode step: Round-to-nearest can")
    assert lines[-1] == "The roofline is hand's, calibrated here on 2026-01-31 on 2 threads."
    assert explained({"experiment": {"spec": spec}}, []) == []
