"""SIGKILL of the process that records, twenty times at random points.

Afterwards the database that lived through it, one rebuilt from the files and one in memory hold the same
rows in every table; and these rows are what plain JSON finds in the spools, with everything that the
killed processes had been told was written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from studio_state.history import History
from studio_state.migrations import TABLES
from studio_state.paths import DataDir
from studio_state.store import Store

KILLS = 20

# The nursery imports everything once, then forks the processes that are killed. Each child goes on with the
# newest spool (which the one before left unfinished) and says on a pipe what was acknowledged to it.
NURSERY = r"""
import itertools, os, random, signal, sys, time
from studio_state import events as ev
from studio_state.experiment import ExperimentSpec, WorkloadSpec
from studio_state.journal import Delete, Tag, Undelete, WriteNote
from studio_state.paths import DataDir
from studio_state.pipeline import parse_pipeline
from studio_state.spool import SpoolWriter
from studio_state.store import Store

data, kills, dice = DataDir.at(sys.argv[1]).open(), int(sys.argv[2]), random.Random(20)
spec = ExperimentSpec(model="m", workload=WorkloadSpec(id="speed"), lanes=(parse_pipeline("rtn:bits=4"),))


def record(out):
    store = Store(data)
    names = sorted(p.stem for p in data.spools.glob("*.jsonl"))
    for number in itertools.count(max(0, len(names) - 1)):
        x = f"e{number:04d}"
        with SpoolWriter(data.spool(x)) as writer:
            def say(*events):
                done = writer.append_all(events)
                store.append(done)
                os.write(out, "".join(f"{x} {e.seq}\n" for e in done).encode())
            if writer.next_seq == 0:
                say(ev.Submitted(spec=spec), ev.Started())
            say(ev.LaneStarted(lane=0, order="baseline"))
            for i in range(40):
                say(ev.Tokens(lane=0, item=str(i), text="x" * 200), ev.Metric(lane=0, name="ttft_s", value=i / 7, item=str(i)))
            store.record(Tag(experiment=x, tag="seen"), WriteNote(experiment=x, text=f"note {number}"), Delete(experiment=x), Undelete(experiment=x))
            say(ev.Output(lane=0, item="0", text="out"), ev.Ratio(lane=1, name="ttft_s", value=0.5, n=3), ev.LaneFinished(lane=0, status="finished"))
            if number % 3:
                store.flush()
            say(ev.Finished())
        if number % 5 == 4:
            store.rebuild()


for kill in range(kills):
    back, out = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(back)
        try:
            record(out)
        finally:
            os._exit(1)
    os.close(out)
    first = os.read(back, 1)  # it has begun to write
    time.sleep(dice.random() ** 2 * 0.3)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
    with open(back, "rb") as told:
        sys.stdout.write((first + told.read()).decode())
    if kill % 4 == 3:  # a line that reached the disk by half
        newest = sorted(data.spools.glob("*.jsonl"))[-1]
        with open(newest, "a") as file:
            file.write('{"experiment":"' + newest.stem + '","seq":')
"""


def tables(history: History) -> dict[str, list[tuple[Any, ...]]]:
    return {name: history.table(name) for name in TABLES}


def test_twenty_kills(tmp_path: Path) -> None:
    data = DataDir.at(tmp_path / "data").open()
    done = subprocess.run(
        [sys.executable, "-c", NURSERY, str(data.root), str(KILLS)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    acknowledged = {tuple(line.split()) for line in done.stdout.splitlines()}
    assert len(acknowledged) >= 2 * KILLS

    with Store(data) as store:
        store.flush()
        assert store.notes == []
        live = tables(store)
        store.rebuild()
        assert tables(store) == live
    with History.in_memory(data) as history:
        assert tables(history) == live

    lines = []
    for path in data.spools.glob("*.jsonl"):
        for line in path.read_text().split("\n")[:-1]:
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    assert acknowledged <= {(e["experiment"], str(e["seq"])) for e in lines}
    kinds = [e["event"] for e in lines]
    counts = {t: len(rows) for t, rows in live.items()}
    assert (counts["metrics"], counts["outputs"], counts["ratios"]) == (
        kinds.count("metric"),
        kinds.count("output"),
        kinds.count("ratio"),
    )
    assert counts["experiments"] == len({e["experiment"] for e in lines})
    assert counts["metrics"] > KILLS
    assert counts["tags"] == counts["notes"] > 0
    assert len({(e["experiment"], e["seq"]) for e in lines}) == len(lines)
