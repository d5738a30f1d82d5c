"""The store against counts taken from the spool files themselves, and everything that can be wrong with its file."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from studio_state import events as ev
from studio_state.database import open_current
from studio_state.errors import StoreError
from studio_state.experiment import ExperimentSpec, ModelInfo, WorkloadSpec
from studio_state.history import History
from studio_state.journal import Delete, GiveVerdict, Import, Tag, Undelete, Untag, WriteNote
from studio_state.migrations import MIGRATIONS, TABLES, migrate, version
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.spool import SpoolWriter
from studio_state.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.at(tmp_path / "data", tmp_path / "cache").open()


@pytest.fixture
def store(data: DataDir) -> Iterator[Store]:
    with Store(data) as opened:
        yield opened


def spec(model: str = "smollm2-135m", lane: str = "rtn:bits=4+snapkv:keep=0.5", workload: str = "needle") -> ExperimentSpec:
    return ExperimentSpec(model=model, workload=WorkloadSpec(id=workload), lanes=(parse_pipeline(lane),))


def story(end: ev.Event | None, asked: ExperimentSpec | None = None, t: float = 1000.0) -> list[ev.Event]:
    """Events of a small experiment with two lanes; the second does not end by itself unless ``end`` is ``Finished``."""
    found: list[ev.Event] = [
        ev.Submitted(spec=asked or spec(), origin="cli", owner="me", t=t),
        ev.Started(environment={"torch": "2"}, t=t + 1),
        ev.ModelLoaded(info=ModelInfo(name="smollm2-135m", family="llm", traits=("gqa",))),
        ev.LaneStarted(lane=0, order="baseline"),
        ev.Tokens(lane=0, item="i", ids=[1], text="x"),
        ev.Metric(lane=0, name="ttft_s", value=0.5, item="i"),
        ev.Metric(lane=0, name="ttft_s", value=0.5, n=1, low=0.4, high=0.6),
        ev.Metric(lane=0, name="itl_p99_s", value=None),
        ev.LaneFinished(lane=0, status="finished"),
        ev.LaneStarted(lane=1, order="rtn:bits=4+snapkv:keep=0.5", interleaved=False),
        ev.Output(lane=1, item="i", kind="choice", text="Ünï\n'\"", expected="a", correct=False, data={"nll": [1.5, None]}),
        ev.Kept(lane=1, item="i", share=[0.0, 0.5, 1.0], layers=["059"]),
        ev.Ratio(lane=1, name="ttft_s", value=0.8, low=0.7, high=0.9, n=9),
        ev.Note(text="other load", level="warning", lane=1),
    ]
    if isinstance(end, ev.Finished):
        found.append(ev.LaneFinished(lane=1, status="finished", flags=["no effect: window"], interleaved=False))
    return [*found, end.model_copy(update={"t": t + 9})] if end else found


def spool(data: DataDir, experiment: str, events: list[ev.Event]) -> list[ev.Event]:
    with SpoolWriter(data.spool(experiment)) as writer:
        return writer.append_all(events)


def tables(history: History) -> dict[str, list[tuple[Any, ...]]]:
    return {name: history.table(name) for name in TABLES}


def counted(data: DataDir) -> Counter[str]:
    """How many lines of each kind the spools hold, by plain JSON."""
    return Counter(json.loads(line)["event"] for p in data.spools.glob("*.jsonl") for line in p.read_text().splitlines())


def test_events_become_rows(data: DataDir, store: Store) -> None:
    store.append(spool(data, "e1", story(ev.Finished())))
    store.flush()
    (row,) = store.experiments()
    assert (row.id, row.status, row.model, row.family, row.workload, row.lanes, row.origin, row.owner) == (
        "e1", "finished", "smollm2-135m", "llm", "needle", 2, "cli", "me"
    )  # fmt: skip
    assert (row.submitted, row.started, row.ended, row.error) == (1000.0, 1001.0, 1009.0, None)
    assert row.spec == spec().model_dump(mode="json")
    assert row.digest == spec().digest()
    assert row.environment == {"torch": "2"}
    assert row.model_info is not None
    assert row.model_info["traits"] == ["gqa"]
    base, lane = store.runs("e1")
    assert (base.lane, base.pipeline, base.status, base.interleaved) == (0, "baseline", "finished", True)
    assert (lane.pipeline, lane.effective, lane.status) == (
        "rtn:bits=4+snapkv:keep=0.5",
        "rtn:bits=4+snapkv:keep=0.5",
        "finished",
    )
    assert (lane.flags, lane.interleaved, lane.steps["steps"][0]) == (
        ("no effect: window",),
        False,
        {"policy": "rtn", "knobs": {"bits": 4}},
    )
    assert [(m.item, m.value, m.low, m.high, m.n) for m in store.metrics("e1", name="ttft_s")] == [
        ("i", 0.5, None, None, None),
        (None, 0.5, 0.4, 0.6, 1),
    ]
    assert [m.name for m in store.metrics("e1", items=False)] == ["ttft_s", "itl_p99_s"]
    assert [(r.lane, r.value, r.low, r.high, r.n) for r in store.ratios("e1")] == [(1, 0.8, 0.7, 0.9, 9)]
    (output,) = store.outputs("e1")
    assert (output.text, output.correct, output.data) == ("Ünï\n'\"", False, {"nll": [1.5, None]})
    (kept,) = store.kept("e1")
    assert (kept.share, kept.layers) == ([0.0, 0.5, 1.0], ["059"])
    assert [(m.level, m.text) for m in store.messages("e1")] == [("warning", "other load")]
    assert [e.seq for e in store.events("e1", since=12)] == [12, 13, 14, 15]
    assert store.experiment("nope") is None
    assert store.runs("nope") == []


@pytest.mark.parametrize(
    ("end", "status", "lane", "message"),
    [
        (ev.Finished(), "finished", "finished", ""),
        (ev.Failed(message="the worker died"), "failed", "failed", "the worker died"),
        (ev.Cancelled(), "cancelled", "cancelled", ""),
        (None, "interrupted", "interrupted", ""),
    ],
)
def test_status_comes_from_the_events(
    data: DataDir, store: Store, end: ev.Event | None, status: str, lane: str, message: str
) -> None:
    store.append(spool(data, "e1", story(end)))
    store.flush()
    found = store.experiment("e1")
    assert found is not None
    assert (found.status, found.error) == (status, message or None)
    assert [(r.status, r.message) for r in store.runs("e1")] == [("finished", ""), (lane, message)]
    assert store.count(status=status) == 1
    assert store.count(status="running") == 0


def test_a_live_experiment_is_queued_then_running_then_interrupted(data: DataDir, store: Store) -> None:
    def status() -> str:
        store.flush()
        found = store.experiment("e1")
        assert found is not None
        return found.status

    with SpoolWriter(data.spool("e1")) as writer:
        store.append([writer.append(ev.Submitted(spec=spec()))])
        assert status() == "queued"
        store.append([writer.append(ev.Started())])
        assert status() == "running"
    assert status() == "interrupted"


def test_ingest_is_idempotent_and_incremental(data: DataDir, store: Store) -> None:
    events = story(ev.Finished())
    with SpoolWriter(data.spool("e1")) as writer:
        for event in events:
            store.append([writer.append(event)])
            store.flush()
            store.ingest(writer.path)
    store.append(spool(data, "e2", events))
    for _ in range(3):
        store.ingest(data.spool("e1"))
        store.flush()
    by_one = [r[1:] for r in store.table("metrics") if r[0] == "e1"]
    at_once = [r[1:] for r in store.table("metrics") if r[0] == "e2"]
    assert by_one == at_once
    assert len(by_one) == 3
    found = counted(data)
    assert (len(store.table("metrics")), len(store.table("outputs")), len(store.table("experiments"))) == (
        found["metric"],
        found["output"],
        found["submitted"],
    )


def test_many_events_in_several_transactions(data: DataDir, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studio_state.ingest.BATCH_EVENTS", 7)
    for i in range(5):
        spool(data, f"e{i}", story(ev.Finished()))
    store.refresh()
    store.flush()
    live = tables(store)
    assert len(live["metrics"]) == counted(data)["metric"] == 15
    monkeypatch.undo()
    with History.in_memory(data) as history:
        assert tables(history) == live


def test_events_must_be_in_a_spool_first(store: Store) -> None:
    with pytest.raises(ValueError, match="write the event to its spool first"):
        store.append([ev.Started()])


def test_journal_changes_what_is_shown_and_can_be_undone(data: DataDir, store: Store) -> None:
    for x in ("e1", "e2"):
        store.append(spool(data, x, story(ev.Finished())))
    store.flush()
    store.record(
        Tag(experiment="e1", tag="good"),
        Tag(experiment="e1", tag="a"),
        WriteNote(experiment="e1", text="Remember"),
        Tag(experiment="e2", tag="b"),
    )
    store.record(Untag(experiment="e2", tag="b"), WriteNote(experiment="e1", lane=1, text="this lane"))
    row = store.experiment("e1")
    assert row is not None
    assert (row.tags, row.note, row.deleted) == (("a", "good"), "Remember", False)
    assert store.tags() == ["a", "good"]
    assert [n.text for n in store.lane_notes("e1")] == ["this lane"]
    store.record(Delete(experiment="e1"))
    assert [r.id for r in store.experiments()] == ["e2"]
    assert [r.id for r in store.experiments(deleted=True)] == ["e1"]
    assert store.count(deleted=None) == 2
    store.record(Undelete(experiment="e1"))
    assert store.count() == 2
    assert data.spool("e1").exists()
    store.record(
        GiveVerdict(experiment="e1", claim="kv-halved", verdict="not shown", numbers={"kv": 0.9}),
        Import(experiment="e2", source="x.jsonl"),
    )
    assert [(v.claim, v.verdict, v.numbers) for v in store.verdicts("e1")] == [("kv-halved", "not shown", {"kv": 0.9})]
    live = tables(store)
    store.rebuild()
    assert tables(store) == live


def test_filters_and_pages(data: DataDir, store: Store) -> None:
    asked = [spec("m1", "snapkv:keep=0.5"), spec("m2", "rtn:bits=4", "speed"), spec("m1", "kivi", "speed")]
    for i, s in enumerate(asked):
        store.append(spool(data, f"e{i}", story(ev.Finished(), s, t=1000.0 + i)))
    store.flush()
    store.record(Tag(experiment="e1", tag="Best"))

    def ids(**filters: Any) -> list[str]:
        assert store.count(**filters) == len(store.experiments(**filters))
        return [r.id for r in store.experiments(**filters)]

    assert ids() == ["e2", "e1", "e0"]
    assert ids(model="m1") == ["e2", "e0"]
    assert ids(workload="speed", model="m1") == ["e2"]
    assert ids(policy="rtn") == ["e1"]
    assert ids(tag="Best") == ["e1"]
    assert ids(text="BEST") == ["e1"]
    assert ids(text="KIVI") == ["e2"]
    assert ids(text="100%_") == []
    assert ids(model="'; DROP TABLE runs; --") == []
    assert [r.id for r in store.experiments(limit=1, offset=1)] == ["e1"]
    assert [(r.experiment, r.lane) for r in store.runs(["e0", "e2"])] == [("e0", 0), ("e0", 1), ("e2", 0), ("e2", 1)]
    with pytest.raises(TypeError, match="no filter colour; allowed: model"):
        store.experiments(colour="red")


def test_store_opened_later_catches_up(data: DataDir) -> None:
    spool(data, "e1", story(None))
    with Store(data) as store:
        store.flush()
        assert store.count(status="interrupted") == 1
    spool(data, "e1", [ev.Note(text="again"), ev.Finished()])
    spool(data, "e2", story(ev.Cancelled()))
    with Store(data) as store:
        store.flush()
        assert [r.status for r in store.experiments()] == ["cancelled", "finished"]


def test_values_that_no_column_holds_stop_only_their_spool(data: DataDir) -> None:
    spool(data, "bad", [ev.Submitted(spec=spec()), ev.Metric(lane=10**30, name="ttft_s", value=1.0)])
    spool(data, "good", story(ev.Finished()))
    with Store(data) as store:
        store.flush()
        assert [r.id for r in store.experiments()] == ["good"]
        assert len(store.notes) == 1
        assert "bad.jsonl holds values that cannot be stored" in store.notes[0]


def test_readers_and_rebuilds_at_the_same_time(data: DataDir, store: Store) -> None:
    for i in range(4):
        store.append(spool(data, f"e{i}", story(ev.Finished())))
    store.flush()
    stop, seen, errors = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add((store.count(), len(store.metrics([f"e{i}" for i in range(4)]))))
            except Exception as e:  # collected for the assertion below
                errors.append(e)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        store.rebuild()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert seen == {(4, 12)}


def test_closed_store_says_so(data: DataDir) -> None:
    store = Store(data)
    store.close()
    store.close()
    for use in (store.experiments, store.flush, store.rebuild):
        with pytest.raises(StoreError, match="closed"):
            use()


# -- other processes


def test_second_studio_is_refused_and_the_cli_works_beside_it(data: DataDir) -> None:
    code = (
        "import sys; from studio_state.paths import DataDir; from studio_state.store import Store\n"
        "s = Store(DataDir.at(sys.argv[1]).open()); print('open', flush=True)\n"
        "sys.stdin.readline(); s.refresh(); s.flush(); print(s.count(), s.tags(), flush=True); sys.stdin.read(); s.close()"
    )
    studio = subprocess.Popen(
        [sys.executable, "-c", code, str(data.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert studio.stdin is not None
    assert studio.stdout is not None
    assert studio.stdout.readline() == "open\n"
    with pytest.raises(
        StoreError, match=r"another Pareto Studio uses the data directory .*; use that one, close it, or choose"
    ) as error:
        Store(data)
    assert "\n" not in str(error.value)
    spool(data, "cli", story(ev.Finished()))
    from studio_state.journal import append_entries

    append_entries(data.journal, [Tag(experiment="cli", tag="from-cli")])
    with History.in_memory(data) as history:
        assert [(r.id, r.tags) for r in history.experiments()] == [("cli", ("from-cli",))]
    studio.stdin.write("go\n")
    studio.stdin.flush()
    assert studio.stdout.readline() == "1 ['from-cli']\n"
    studio.stdin.close()
    assert studio.wait() == 0
    with Store(data) as store:
        assert store.count() == 1


def test_foreign_program_holding_the_file(data: DataDir) -> None:
    Store(data).close()
    code = "import sys, duckdb; c = duckdb.connect(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(data.database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(StoreError, match="in use by another program; close it"):
        Store(data)
    other.communicate()
    Store(data).close()


# -- the file


def files(data: DataDir) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in data.root.glob("studio.duckdb*")}


def test_database_of_a_newer_version_is_left_alone(data: DataDir) -> None:
    Store(data).close()
    with duckdb.connect(str(data.database)) as con:
        con.execute("INSERT INTO migrations VALUES (999, 'm999_future', now()::TIMESTAMP)")
    before = files(data)
    with pytest.raises(
        StoreError, match=r"from a newer Pareto Studio \(record version 999, this program knows 1\); update"
    ) as error:
        Store(data)
    assert "\n" not in str(error.value)
    assert files(data) == before


@pytest.mark.parametrize("damage", ["junk", "empty", "half", "header"])
def test_damaged_database_is_kept_and_built_anew(data: DataDir, damage: str) -> None:
    with Store(data) as store:
        store.append(spool(data, "e1", story(ev.Finished())))
        store.record(Tag(experiment="e1", tag="good"))
        store.flush()
        live = tables(store)
    good = data.database.read_bytes()
    bad = {
        "junk": b"no database",
        "empty": b"",
        "half": good[: len(good) // 2],
        "header": good[:5000] + b"x" * 100 + good[5100:],
    }[damage]
    data.database.write_bytes(bad)
    with Store(data) as store:
        assert tables(store) == live
        assert len(store.notes) == 1
        assert "was damaged" in store.notes[0]
    (kept,) = data.root.glob("studio.duckdb.damaged-*")
    assert kept.read_bytes() == bad
    with Store(data) as store:
        assert store.notes == []


def test_lost_database_is_built_anew(data: DataDir) -> None:
    with Store(data) as store:
        store.append(spool(data, "e1", story(ev.Finished())))
        store.flush()
        live = tables(store)
    data.database.unlink()
    with Store(data) as store:
        store.flush()
        assert tables(store) == live


def test_folder_in_place_of_the_database(data: DataDir) -> None:
    data.database.mkdir()
    with pytest.raises(StoreError, match="is a folder; move it away"):
        Store(data)
    shutil.rmtree(data.database)
    Store(data).close()


def test_full_disk_under_the_database_loses_nothing(data: DataDir, store: Store) -> None:
    """No file may grow: the batch fails with a sentence, reading goes on, and later everything is stored."""
    store.append(spool(data, "e1", story(ev.Finished())))
    store.flush()
    big = spool(
        data, "e2", [*story(None), *(ev.Output(lane=0, item=str(i), text=f"{i}" * 500) for i in range(3000)), ev.Finished()]
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(p.stat().st_size for p in data.root.glob("studio.duckdb*"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, hard))
    try:
        store.append(big)
        with pytest.raises(StoreError, match="the results are safe in their spools") as error:
            store.flush()
        assert "\n" not in str(error.value)
        assert [r.id for r in store.experiments()] == ["e1"]
        with pytest.raises(StoreError, match="the results are safe in their spools"):
            store.rebuild()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.flush()
    live = tables(store)
    assert len(live["outputs"]) == counted(data)["output"] == 3002
    store.rebuild()
    assert tables(store) == live


def test_migrations_are_taken_in_order_and_once(tmp_path: Path) -> None:
    path = tmp_path / "x.duckdb"
    with open_current(path) as con:
        assert version(con) == len(MIGRATIONS)

        def m002_more(c: duckdb.DuckDBPyConnection) -> None:
            c.execute("ALTER TABLE tags ADD COLUMN colour VARCHAR")

        def m003_broken(c: duckdb.DuckDBPyConnection) -> None:
            c.execute("CREATE TABLE half (i INT); SELECT * FROM missing")

        assert migrate(con, "", (*MIGRATIONS, m002_more)) == 1
        assert migrate(con, "", (*MIGRATIONS, m002_more)) == 0
        with pytest.raises(duckdb.Error):
            migrate(con, "", (*MIGRATIONS, m002_more, m003_broken))
        assert version(con) == 2
        assert con.execute("SELECT name FROM migrations ORDER BY version").fetchall() == [("m001_record",), ("m002_more",)]
        assert con.execute("SELECT count(*) FROM duckdb_tables() WHERE table_name = 'half'").fetchone() == (0,)
