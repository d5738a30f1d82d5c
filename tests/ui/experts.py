"""A constructed recording of a mixture of experts, whose load is known: as a spool that a studio opens.

Eight experts in layers 2 to 4 of four (the first has none). Lane 1 leaves out experts 7 and 8 of every layer.
"""

from __future__ import annotations

from collections.abc import Iterator

from studio_state import events as ev
from tests.ui import pictured

EXPERTS = "20260104-100000-000001"
EVEN = [0.125] * 8
STEEP = [0.5, 0.25, 0.1, 0.06, 0.05, 0.04, 0.0, 0.0]
MILD = [0.2, 0.18, 0.15, 0.12, 0.1, 0.1, 0.08, 0.07]
FEWER = [0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0]
LOADS = ([[], EVEN, STEEP, MILD], [[], FEWER, STEEP, FEWER])


def experts() -> Iterator[ev.Event]:
    """Two lanes, two items; the loads are told with the first."""
    yield ev.Submitted(spec=pictured.spec("prompts", ("Six experts", "expert-drop", {"keep": 0.75})))
    yield ev.Started()
    for item, index in (("a", 0), ("b", 1)):
        for lane in range(2):
            yield ev.ItemStarted(lane=lane, item=item, index=index, of=2, prompt="Hello")
            yield from pictured.answer(lane, item, "top right", "top right")
            yield ev.ExpertLoad(lane=lane, item=item, layers=LOADS[lane] if item == "a" else LOADS[1 - lane])
    yield from pictured.ends(2)
