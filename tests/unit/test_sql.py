"""User SQL: what it sees, and one clear sentence for everything it must not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from studio_state import events as ev
from studio_state.errors import SqlError
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.history import History
from studio_state.journal import Delete, Tag, append_entries
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.spool import SpoolWriter
from studio_state.sqlbox import answer, run_sql


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = DataDir.at(tmp_path_factory.mktemp("data")).open()
    spec = ExperimentSpec(model="m", workload=WorkloadSpec(id="speed"), lanes=(parse_pipeline("rtn:bits=4"),))
    for x, end in (("e1", [ev.Finished()]), ("e2", []), ("hidden", [ev.Finished()])):
        with SpoolWriter(data.spool(x)) as writer:
            writer.append_all([
                ev.Submitted(spec=spec, t=0.0), ev.Metric(lane=1, name="decode_tokens_per_s", value=20.0, item="i"),
                ev.Metric(lane=1, name="decode_tokens_per_s", value=20.0, n=1),
                ev.Ratio(lane=1, name="decode_tokens_per_s", value=2.0, low=1.5, high=2.5, n=9), *end,
            ])  # fmt: skip
    append_entries(data.journal, [Delete(experiment="hidden"), Tag(experiment="e1", tag="good")])
    with History.in_memory(data) as history:
        return history.snapshot(data.root / "it's a snapshot")


def ask(sql: str, snapshot: Path, seconds: float = 5, rows: int = 10_000) -> dict:
    """The box's own function, in this process: same locks, no start-up time."""
    return answer({"sql": sql, "snapshot": str(snapshot), "seconds": seconds, "rows": rows})


def test_friendly_views(snapshot: Path) -> None:
    found = run_sql(
        "SELECT experiment, pipeline, metric, value, ratio, ratio_low, tags FROM results ORDER BY experiment", snapshot
    )
    assert found.columns == ["experiment", "pipeline", "metric", "value", "ratio", "ratio_low", "tags"]
    assert found.rows == [
        ["e1", "rtn:bits=4", "decode_tokens_per_s", 20.0, 2.0, 1.5, ["good"]],
        ["e2", "rtn:bits=4", "decode_tokens_per_s", 20.0, 2.0, 1.5, None],
    ]
    assert ask("SELECT id, status, submitted FROM experiments ORDER BY id", snapshot)["rows"] == [
        ["e1", "finished", "1970-01-01 00:00:00"],
        ["e2", "interrupted", "1970-01-01 00:00:00"],
    ]
    assert ask("SELECT count(*) FROM metrics", snapshot)["rows"] == [[4]]
    assert ask("SHOW TABLES", snapshot)["rows"] == [
        [x]
        for x in (
            "experiments",
            "imports",
            "kept",
            "messages",
            "metrics",
            "notes",
            "outputs",
            "ratios",
            "results",
            "runs",
            "tags",
            "verdicts",
        )
    ]
    assert ask("SELECT 'nan'::DOUBLE, 'inf'::DOUBLE, 1.50::DECIMAL(4,2), '\\xFF'::BLOB, {'a': [1]}", snapshot)["rows"] == [
        [None, None, "1.50", "ff", {"a": [1]}]
    ]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("DELETE FROM record.experiments", "DELETE is refused"),
        ("INSERT INTO record.tags VALUES ('e', 't', 0, '')", "INSERT is refused"),
        ("CREATE TABLE x AS SELECT 1", "CREATE is refused"),
        ("DROP VIEW results", "DROP is refused"),
        ("COPY results TO '{folder}/out.csv'", "COPY is refused"),
        ("EXPORT DATABASE '{folder}/out'", "EXPORT is refused"),
        ("ATTACH '{folder}/out.duckdb'", "ATTACH is refused"),
        ("INSTALL httpfs", "LOAD is refused"),
        ("LOAD httpfs", "LOAD is refused"),
        ("SET enable_external_access = true", "SET is refused"),
        ("PRAGMA database_list", "PRAGMA is refused"),
        ("SELECT 1; SELECT 2", "holds 2 statements"),
        ("SELECT 1; DROP VIEW results", "holds 2 statements"),
        ("", "holds 0 statements"),
        ("-- nothing", "holds 0 statements"),
        ("SELEC 1", "not SQL that DuckDB understands"),
        ("SELECT * FROM nowhere", "nowhere does not exist"),
        ("SELECT * FROM read_text('{folder}/secret.txt')", "cannot be used in queries"),
        ("SELECT * FROM read_csv('{folder}/secret.txt')", "cannot be used in queries"),
        ("SELECT * FROM read_parquet('{folder}/it''s a snapshot/runs.parquet')", "cannot be used in queries"),
        ("SELECT * FROM glob('{folder}/*')", "cannot be used in queries"),
        ("SELECT * FROM '{folder}/secret.txt'", "does not exist"),
        ("SELECT * FROM snapshot", "does not exist"),
        ("SELECT * FROM query('COPY results TO ''{folder}/out.csv''')", "single SELECT"),
        ("EXPLAIN ANALYZE COPY results TO '{folder}/out.csv'", "cannot be used in queries"),
        ("SELECT * FROM range(10001)", "more than 10000 rows"),
        ("SELECT list(i) FROM range(1000000000) t(i)", "more than 512MB of memory"),
    ],
)
def test_refusals_are_one_clear_sentence(snapshot: Path, sql: str, words: str) -> None:
    (snapshot.parent / "secret.txt").write_text("secret")
    before = sorted(p.name for p in snapshot.parent.iterdir())
    found = ask(sql.format(folder=snapshot.parent), snapshot)
    assert words in found["error"]
    assert "\n" not in found["error"]
    assert "secret\n" not in str(found)
    assert sorted(p.name for p in snapshot.parent.iterdir()) == before


def test_ten_thousand_rows_are_allowed(snapshot: Path) -> None:
    assert len(ask("SELECT * FROM range(10000)", snapshot)["rows"]) == 10_000


def test_endless_query_is_stopped(snapshot: Path) -> None:
    endless = "SELECT sum(sqrt(range)) FROM range(100000000000000)"
    assert "longer than 0.3 s" in ask(endless, snapshot, seconds=0.3)["error"]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT sum(sqrt(range)) FROM range(100000000000000)", "longer than 0.5 s"),
        ("SELECT repeat('x', 1000000000) FROM range(10)", "longer than 0.5 s|memory"),
        ("SELECT * FROM read_text('/etc/hostname')", "cannot be used in queries"),
        ("DROP VIEW results", "DROP is refused"),
    ],
)
def test_the_process_ends_with_an_sql_error(snapshot: Path, sql: str, words: str) -> None:
    with pytest.raises(SqlError, match=words) as error:
        run_sql(sql, snapshot, seconds=0.5)
    assert "\n" not in str(error.value)


def test_missing_snapshot(tmp_path: Path) -> None:
    with pytest.raises(SqlError, match=r"copy of the record in .* cannot be loaded"):
        run_sql("SELECT 1", tmp_path)
