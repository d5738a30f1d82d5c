"""A constructed recording of a race whose analyzers' findings are known: as a spool that a studio opens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from studio_state import events as ev
from studio_state.speed_story import KINDS
from tests.ui import pictured

EXPLAINED = "20260105-100000-000001"
DEVICE = {"name": "A machine", "bandwidth": 10e9, "peak": {"float32": 100e9}, "source": "measured", "threads": 2}


def findings(seconds: float, kinds: dict[str, float], moved: float) -> list[tuple[str, dict[str, Any]]]:
    """What both analyzers say of one lane's decode step."""
    work = {
        "name": "q_proj",
        "group": "maps",
        "flops": 10e6,
        "weight_bytes": moved,
        "bytes": moved,
        "seconds": moved / 10e9,
        "bound": "memory",
    }
    told = {"seconds": seconds, "steps": 8, "kinds": {**dict.fromkeys(KINDS, 0.0), **kinds}, "operators": [], "slowed": 1.2}
    return [
        ("runtime-dissection", {"phases": {"decode": told}}),
        (
            "llm-viewer",
            {
                "phases": {"decode": {"operations": [work], "seconds": {"maps": moved / 10e9}}},
                "device": DEVICE,
                "dtype": "float32",
            },
        ),
    ]


LANES = (
    findings(0.010, {"products": 0.008, "attention": 0.001, "launching": 0.001}, 40e6),
    findings(0.008, {"products": 0.002, "unpacking": 0.004, "attention": 0.001, "launching": 0.001}, 10e6),
)


def explained() -> Iterator[ev.Event]:
    """Two lanes, one item."""
    yield ev.Submitted(spec=pictured.spec("prompts", ("Four bits", "rtn", {"bits": 4})))
    yield ev.Started()
    for lane, found in enumerate(LANES):
        yield ev.ItemStarted(lane=lane, item="a", index=0, of=1, prompt="Hello")
        yield from pictured.answer(lane, "a", "top right", "top right")
        for analyzer, data in found:
            yield ev.Analysis(lane=lane, analyzer=analyzer, data=data)
    yield from pictured.ends(2)
