"""How fast a large history opens: ``python -m studio_state.bench_history``. Prints times, asserts nothing.

The record is synthetic (200,000 runs, 1,000,000 rows of metrics) and lies in a temporary folder. Timed is what
the server does before the history can be shown, each step as the page asks for it.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import duckdb

from studio_state.database import open_current
from studio_state.history_page import PAGE_ROWS, read_page
from studio_state.paths import DataDir
from studio_state.store import Store

RUNS = 200_000
METRIC_ROWS = 1_000_000
LANES = 4
REPEATS = 7
TARGET_MS = 300
_NAMES = ("decode_tokens_per_s", "kv_bytes", "weight_bytes", "accuracy", "ttft_s")


def fill(con: duckdb.DuckDBPyConnection, runs: int = RUNS, metric_rows: int = METRIC_ROWS) -> None:
    """Write a made-up history straight into the tables: ``LANES`` lanes an experiment, the same number of metrics a lane."""
    experiments, per_run = runs // LANES, metric_rows // runs
    ident = "printf('20260101-%06d-abcdef', {0})"
    spec = '{"model": "smollm2-135m", "workload": {"id": "needle", "options": {"items": 20}}, "lanes": []}'
    con.execute(
        f"""INSERT INTO experiments SELECT {ident.format("i")}, CASE WHEN i % 50 = 0 THEN 'failed' ELSE 'finished' END, md5(i::VARCHAR)[:16], 'studio', '',
            'model-' || (i % 12), 'llm', ['needle', 'perplexity', 'speed'][1 + i % 3], 'cpu', 'auto', 2, 1, i % 7, 0, {LANES},
            1.7e9 + i * 60, 1.7e9 + i * 60 + 1, 1.7e9 + i * 60 + 50, NULL, '{spec}', '{{"torch": "2"}}', NULL, NULL
            FROM range({experiments}) t(i)"""
    )
    con.execute(
        f"""INSERT INTO runs SELECT {ident.format("i // " + str(LANES))}, i % {LANES},
            CASE WHEN i % {LANES} = 0 THEN 'baseline' ELSE 'snapkv:keep=0.' || (i % 90 + 10) END, '{{"name": "", "steps": []}}',
            CASE WHEN i % {LANES} = 0 THEN [] ELSE ['snapkv'] END, 'snapkv', 'finished', [], '', true FROM range({runs}) t(i)"""
    )
    con.execute(
        f"""INSERT INTO metrics SELECT {ident.format(f"i // {LANES * per_run}")}, i, i // {per_run} % {LANES},
            {list(_NAMES)}[1 + i % {min(per_run, len(_NAMES))}], NULL, 0, 10 + i % 1000, 'measured', 20, NULL, NULL FROM range({metric_rows}) t(i)"""
    )
    con.execute(
        f"""INSERT INTO ratios SELECT experiment, seq, lane, name, 1.1, 1.05, 1.15, 20 FROM metrics
            WHERE lane > 0 AND name = '{_NAMES[0]}'"""
    )
    con.execute(
        f"INSERT INTO tags SELECT {ident.format('i * 10')}, 'tag-' || (i % 9), 1.7e9, '' FROM range({experiments // 10}) t(i)"
    )


def steps(store: Store) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    last = store.count() // PAGE_ROWS
    return {
        "open: first page and the filters": lambda: (
            read_page(store), store.values("model"), store.values("workload"), store.tags()
        ),
        "last page": lambda: read_page(store, last - 1),
        "filter by model and tag": lambda: read_page(store, model="model-3", tag="tag-4"),
        "filter by text": lambda: read_page(store, text="keep=0.42"),
        "filter by policy": lambda: read_page(store, policy="snapkv"),
    }  # fmt: skip


def milliseconds(step: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Wall time of each repetition, the first of a cold connection left out."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Build the history, time the steps, print one line each."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataDir.at(Path(folder) / "data", Path(folder) / "cache").open()
        with open_current(data.database) as con:
            fill(con)
            con.execute("CHECKPOINT")
        with Store(data) as store:
            store.flush()
            runs, metrics = RUNS, METRIC_ROWS
            print(
                f"{runs:,} runs in {store.count():,} experiments, {metrics:,} rows of metrics; target for opening: {TARGET_MS} ms"
            )
            for name, step in steps(store).items():
                times = milliseconds(step)
                print(f"{name:34} median {statistics.median(times):6.0f} ms, slowest {max(times):6.0f} ms, n = {len(times)}")


if __name__ == "__main__":
    main()
