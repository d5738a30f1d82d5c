"""The SQL box: a query over a fresh copy of the record, in a process of its own."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from studio_state.history import History
from studio_state.sqlbox import run_sql

SHOWN_ROWS = 500
MAX_QUERY = 20_000
EXAMPLES = [
    (
        "Fastest lanes",
        "SELECT model, workload, pipeline, value AS tokens_per_s, ratio\nFROM results WHERE metric = 'decode_tokens_per_s'\nORDER BY ratio DESC NULLS LAST LIMIT 20",
    ),
    (
        "Quality by pipeline",
        "SELECT pipeline, workload, metric, count(*) AS runs, round(avg(value), 4) AS mean\nFROM results WHERE metric IN ('accuracy', 'perplexity', 'kl_to_baseline')\nGROUP BY ALL ORDER BY workload, metric, mean",
    ),
    (
        "Slower than the baseline",
        "SELECT experiment, pipeline, ratio, ratio_low, ratio_high\nFROM results WHERE metric = 'decode_tokens_per_s' AND ratio_high < 1\nORDER BY ratio",
    ),
]


def answer_query(history: History, sql: str) -> dict[str, Any]:
    """The result as texts, at most ``SHOWN_ROWS`` rows of it.

    Raises:
        SqlError: the query is refused, wrong, too slow or too large; one sentence.
        StoreError: the record cannot be copied.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = run_sql(sql[:MAX_QUERY], history.snapshot(Path(folder) / "snapshot"))
    shown = [[_text(v) for v in row] for row in found.rows[:SHOWN_ROWS]]
    count = f"{len(found.rows):,} {'row' if len(found.rows) == 1 else 'rows'}"
    note = f"{count} in {time.perf_counter() - start:.1f} s" + (
        f"; the first {SHOWN_ROWS} are shown" if len(found.rows) > SHOWN_ROWS else ""
    )
    return {"columns": found.columns, "rows": shown, "note": note}


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)
