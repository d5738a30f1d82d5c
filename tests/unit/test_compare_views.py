"""Names, sweeps, latencies, differences, exports and actions of the compare page, each from real spools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from app.compare_diff import diff_of, read_side
from app.compare_history import act, history_rows
from app.compare_latency import latencies_of, latency_figure
from app.compare_sweep import find_sweeps, sweep_figure
from app.components.vega_chart import vega_bundle
from studio_state import events as ev
from studio_state.catalog import Catalog
from studio_state.errors import StoreError
from studio_state.export import COLUMNS, export_runs
from studio_state.history_page import read_page, read_runs
from studio_state.store import Store
from tests.unit.compare_record import Record

CATALOG = Catalog.load()


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path)


def test_names_tell_runs_apart(record: Record) -> None:
    record.add({"baseline": {"ttft_s": 1}, "h2o:keep=0.5": {"ttft_s": 1}}, model="org/one")
    record.add({"baseline": {"ttft_s": 1}, "h2o:keep=0.5": {"ttft_s": 1}}, model="/models/two")
    record.add({"baseline": {"ttft_s": 1}}, model="org/one")
    names = [p.name for p in record.picked()]
    assert len(set(names)) == 5
    assert names[1] == "h2o:keep=0.5 · one"
    assert names[2:4] == ["Baseline · two", "h2o:keep=0.5 · two"]
    assert [p.mark for p in record.picked()] == ["●", "■", "●", "▲", "●"]


def test_sweeps_need_all_else_equal(record: Record) -> None:
    record.add(
        {
            "baseline": {},
            "snapkv:keep=0.25": {"ttft_s": 1},
            "snapkv": {"ttft_s": 2},
            "snapkv:keep=0.75,window=8": {"ttft_s": 3},
            "rtn+snapkv:keep=0.1": {"ttft_s": 4},
        }
    )
    record.add({"baseline": {}, "snapkv:keep=0.9": {"ttft_s": 5}})
    record.add({"baseline": {}, "snapkv:keep=0.6": {"ttft_s": 6}}, seed=1)
    (sweep,) = find_sweeps(record.picked(), CATALOG)
    assert (sweep.policy, sweep.knob) == ("snapkv", "keep")
    assert [(v, p.id) for v, p in sweep.points] == [(0.25, "e0000/1"), (0.5, "e0000/2"), (0.9, "e0001/1")]  # 0.5 is the default
    figure = sweep_figure(record.picked(), CATALOG, "ttft_s", None)
    assert [row["cells"][1] for row in figure["table"]["rows"]] == ["0.25", "0.5", "0.9"]
    assert vl_convert.vegalite_to_svg({**figure["specs"][0], "width": 300}).count(">■<") == 1
    assert "No two picked runs differ in exactly one knob" in sweep_figure(record.picked()[:2], CATALOG, "ttft_s", None)["empty"]


def test_latencies_are_between_tokens_of_one_item(record: Record) -> None:
    said = [
        ev.Tokens(lane=0, item="a", ids=[1, 2], at=[0.5, 0.6]), ev.Tokens(lane=1, item="a", ids=[1], at=[9.0]),
        ev.Tokens(lane=0, item="a", ids=[3], at=[0.9]), ev.Tokens(lane=0, item="b", ids=[1, 2], at=[0.2, 0.25]),
        ev.Tokens(lane=0, item="a", repeat=1, ids=[1, 2], at=[0.1, 0.2]),
    ]  # fmt: skip
    found = latencies_of(said)
    assert found[0] == pytest.approx([0.1, 0.3, 0.05, 0.1])
    assert found[1] == []
    record.add({"baseline": {}, "h2o": {}}, more=said)
    history = record.history()
    figure = latency_figure(history, record.picked(history))
    assert [row["cells"][:3] for row in figure["table"]["rows"]] == [["Baseline", "4", "100 ms"]]
    shares = [r["share"] for r in figure["specs"][0]["datasets"].popitem()[1]]
    assert shares == [25, 50, 75, 100]
    assert "hold no times of single tokens" in latency_figure(history, record.picked(history)[1:])["empty"]


def test_diff_pairs_only_what_was_the_same(record: Record) -> None:
    def told(lane: int, right: list[bool], nll: list[float]) -> list[ev.Event]:
        items = [ev.ItemStarted(lane=lane, item=f"i{i}", prompt=f"p{i}") for i in range(len(right))]
        outputs = [ev.Output(lane=lane, item=f"i{i}", correct=c) for i, c in enumerate(right)]
        return [*items, *outputs, *(ev.Metric(lane=lane, name="nll", value=v, item=f"i{i}") for i, v in enumerate(nll))]

    a, b = [True] * 8, [True] * 2 + [False] * 6
    x = list(np.linspace(1, 2, 8))
    more = [*told(0, a, x), *told(1, b, [v + 0.5 for v in x])]
    record.add({"baseline": {"accuracy": 1.0, "kv_bytes": 100}, "snapkv:keep=0.5": {"accuracy": 0.25, "kv_bytes": 50}}, more=more)
    record.add(
        {"baseline": {"accuracy": 1.0}},
        seed=5,
        more=[ev.ItemStarted(lane=0, item="i0", prompt="another"), ev.Output(lane=0, item="i0", correct=True)],
    )
    history = record.history()
    base, lane, other = (read_side(history, p) for p in record.picked(history))
    shown = diff_of(base, lane, CATALOG)
    spec, place, results = (s["rows"] for s in shown["sections"])
    rows = {r["metric"]: r for r in results}
    assert shown["notes"] == []
    knobs = {f"snapkv.{name}" for name in CATALOG.by_id["snapkv"].knobs["properties"]}
    assert {r["name"] for r in spec if r["differs"]} == {"pipeline", *knobs}
    assert not [r for r in place if r["differs"]]
    assert rows["accuracy"]["test"].startswith("only A right: 6, only B right: 0 of 8; McNemar p = 0.0312")  # 2 / 2**6
    assert rows["nll"]["test"].startswith("B − A: 0.500 (0.500 to 0.500, paired bootstrap, n = 8)")
    assert (rows["kv_bytes"]["ratio"], rows["kv_bytes"]["verdict"]) == ("0.50×", "better")
    apart = diff_of(base, other, CATALOG)
    assert "did not see the same items" in apart["notes"][0]
    assert not [r for r in apart["sections"][2]["rows"] if r["test"]]


def test_export_holds_every_value_of_the_picked_lanes(record: Record) -> None:
    record.add(
        {"baseline": {"ttft_s": 0.5}, "h2o:keep=0.5": {"ttft_s": 0.25}},
        more=[ev.Metric(lane=1, name="ttft_s", value=0.3, item='a "b",c'), ev.Ratio(lane=1, name="ttft_s", value=0.5, n=3)],
    )
    lines = export_runs(record.history(), [("e0000", 1)], "csv").decode().splitlines()
    assert lines[0].split(",") == list(COLUMNS)
    assert len(lines) == 3
    assert lines[1].endswith("ttft_s,s,,0,0.25,,,,measured,0.5,,,3")
    assert lines[2].endswith(',ttft_s,s,"a ""b"",c",0,0.3,,,,measured,,,,')
    with pytest.raises(StoreError, match="pick at least one run"):
        export_runs(record.history(), [("nobody", 0)], "parquet")


def test_pages_and_runs(record: Record) -> None:
    for _ in range(5):
        record.add({"baseline": {"ttft_s": 1.0}, "h2o": {"ttft_s": 2.0}})
    history = record.history()
    page = read_page(history, 1, 2)
    assert (page.total, [e.id for e in page.experiments]) == (5, ["e0002", "e0001"])
    assert [r.value("ttft_s") for r in page.runs["e0002"]] == [1.0, 2.0]
    keys = [("e0003", 1), ("nobody", 0), ("e0001", 0), ("e0003", 1)]
    assert [r.key for r in read_runs(history, keys)] == [("e0003", 1), ("e0001", 0)]
    shown = history_rows(history, {"page": 999})
    assert (shown["page"], shown["pages"], len(shown["experiments"])) == (0, 1, 5)
    assert history_rows(history, {"text": "no such thing"})["empty"].startswith("No experiment fits")


def test_actions_go_through_the_journal_and_undo_restores(record: Record) -> None:
    record.add({"baseline": {"ttft_s": 1.0}})
    record.add({"baseline": {"ttft_s": 1.0}})
    with Store(record.data) as store:
        store.flush()
        both = ["e0000", "e0001"]
        act(store, {"do": "tag", "experiments": ["e0000"], "text": "old"})
        undo = act(store, {"do": "tag", "experiments": both, "text": "old"})["undo"]
        act(store, undo)
        assert [e.tags for e in store.experiments()] == [(), ("old",)]  # the tag that was there before stays
        act(store, {"do": "note", "experiments": ["e0000"], "text": "first"})
        undo = act(store, {"do": "note", "experiments": ["e0000"], "text": "second"})["undo"]
        act(store, undo)
        assert store.experiments()[1].note == "first"
        undo = act(store, {"do": "delete", "experiments": both})["undo"]
        assert store.count() == 0
        assert history_rows(store, {})["empty"].startswith("All experiments are deleted")
        act(store, undo)
        assert store.count() == 2
        for bad, sentence in (({"do": "tag", "experiments": both, "text": "x" * 101}, "a tag has 1 to 100 characters; this one has 101"),
                              ({"do": "tag", "experiments": ["nobody"], "text": "x"}, "not in the history any more"),
                              ({"do": "burn", "experiments": both}, "cannot 'burn'")):  # fmt: skip
            with pytest.raises(StoreError, match=sentence):
                act(store, bad)
    kinds = [json.loads(line)["kind"] for line in record.data.journal.read_text().splitlines()]
    assert kinds == ["tag", "tag", "untag", "note", "note", "note", "delete", "delete", "undelete", "undelete"]


def test_the_chart_library_is_written_once(tmp_path: Path) -> None:
    first = vega_bundle(tmp_path)
    stamp = first.stat().st_mtime_ns
    assert vega_bundle(tmp_path).stat().st_mtime_ns == stamp
    text = first.read_text(encoding="utf-8")
    assert text.startswith("(()=>{")
    assert "vegaEmbed" in text
    assert [p.name for p in first.parent.iterdir() if p.suffix == ".part"] == []
