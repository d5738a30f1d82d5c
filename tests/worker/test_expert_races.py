"""Races of models with experts: their load is counted in every lane and told once an item and lane."""

from __future__ import annotations

from pathlib import Path

from studio_state.events import ExpertLoad, LaneFinished
from studio_state.metrics import METRICS
from studio_state.spool import SpoolWriter, read_spool
from tests import tiny
from tests.worker.test_engine import of, race, value
from workers.host import ModelHost


def test_every_lane_tells_its_load(tmp_path: Path) -> None:
    lanes = ("expert-prune:keep=0.5,tokens=64", "top-k-experts", "expert-prune:keep=0.25,tokens=64+top-k-experts")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox\nA cache keeps the keys and values of earlier tokens\n")
    options = {"file": str(prompts)}
    events = race(ModelHost(), tiny.moe_folder("olmoe"), *lanes, max_new_tokens=4, repeats=2, options=options)
    assert {e.name for e in events if e.event == "metric"} <= set(METRICS)  # type: ignore[attr-defined]
    assert [(e.status, e.flags) for e in of(events, LaneFinished)] == [("finished", [])] * 4
    told = of(events, ExpertLoad)
    assert len(told) == len({(e.lane, e.item) for e in told}) == 4 * 2  # not once a repeat
    with SpoolWriter(tmp_path / "e1.jsonl") as spool:
        spool.append_all(events)
    kept = of(list(read_spool(tmp_path / "e1.jsonl")), ExpertLoad)
    assert [(e.lane, e.item, e.layers) for e in kept] == [(e.lane, e.item, e.layers) for e in told]
    for e in told:
        assert [len(layer) for layer in e.layers] == [8, 8]
        assert all(abs(sum(layer) - 1) < 1e-3 for layer in e.layers)
    assert [value(events, lane, "expert_top_k") for lane in range(4)] == [2, 2, 1, 1]
    used = [value(events, lane, "experts_used") for lane in range(4)]
    assert used[0] > used[1] <= 4
    assert used[3] <= 2
    assert all(0 <= value(events, lane, "expert_load_entropy") <= 1 for lane in range(4))
