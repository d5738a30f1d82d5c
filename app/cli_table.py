"""The table at the end of a run: lanes as columns, metrics as rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.components.numbers import interval_text, metric_quantity, ratio_text
from studio_state.metrics import METRICS

MIN_WIDTH = 100


def wide_console(stderr: bool = False) -> Console:
    """A console that does not squeeze tables where the output is not a terminal."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=max(MIN_WIDTH, 400))


def result_table(report: dict[str, Any]) -> Table:
    """Metrics of all lanes; under each value its ratio to the reference with the 95 % interval.

    Args:
        report: from :func:`app.report.document`.
    """
    lanes = report["lanes"]
    reference = (report["experiment"]["spec"] or {}).get("reference", 0)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for lane in lanes:
        table.add_column(Text(lane["name"] or lane["pipeline"]), justify="right")
    table.add_row("status", *(lane["status"] for lane in lanes))
    for name in metric_order(lanes):
        cells = [_cell(name, lane, lane["lane"] == reference) for lane in lanes]
        table.add_row(name, *cells)
    return table


def metric_order(lanes: Sequence[dict[str, Any]]) -> list[str]:
    """Names that any lane has, in the order of ``METRICS``; unknown ones last."""
    present = {name for lane in lanes for name in lane["metrics"]}
    return [n for n in METRICS if n in present] + sorted(present - METRICS.keys())


def print_result(report: dict[str, Any]) -> None:
    """What was run, and its table, on stdout."""
    console = wide_console()
    console.print(_title(report), markup=False, soft_wrap=True)
    console.print(result_table(report))


def _title(report: dict[str, Any]) -> str:
    experiment = report["experiment"]
    spec = experiment["spec"] or {}
    return f"{spec.get('model', '')} · {spec.get('workload', {}).get('id', '')} · {experiment['id']} · ratios: lane / reference, 95 % interval"


def _cell(name: str, lane: dict[str, Any], is_reference: bool) -> Text:
    if name not in lane["metrics"]:
        return Text("–", style="dim")
    text = Text(str(metric_quantity(name, lane["metrics"][name])))
    source = lane["sources"].get(name, "measured")
    if source != "measured":
        text.append(f" ({source})", style="dim")
    ratio = lane["ratios"].get(name)
    if ratio and not is_reference:
        interval = interval_text(ratio["low"], ratio["high"])
        text.append(f"\n{ratio_text(ratio['value'])}" + (f" [{interval}]" if interval else ""), style="bold")
    return text


def remarks(report: dict[str, Any]) -> list[str]:
    """Sentences that belong under the table."""
    experiment, lanes = report["experiment"], report["lanes"]
    found = [f"lane {x['lane']} ({x['pipeline']}): {said}" for x in lanes for said in (*x["flags"], x["message"]) if said]
    if experiment["model"] and experiment["model"].get("note"):
        found.append(experiment["model"]["note"])
    if not experiment["fits_baseline"]:
        found.append("no baseline on this device: it does not fit into memory, so there are no ratios to it")
    if any(not lane["interleaved"] for lane in lanes):
        found.append("the lanes did not fit into memory together and ran one after the other (interleaved: false)")
    return found
