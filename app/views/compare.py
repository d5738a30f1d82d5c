"""The compare page: the history, the runs picked from it, and what can be said about them side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from app.compare_diff import diff_of, read_side
from app.compare_files import export_files, import_file
from app.compare_history import act, history_rows
from app.compare_latency import latency_figure
from app.compare_pareto import baseline_band, pareto_figure
from app.compare_runs import MAX_PICKED, Picked, default_quality, load_picked, quality, speed_and_memory, table_style
from app.compare_sql import EXAMPLES, answer_query
from app.compare_sweep import sweep_figure
from app.components.compare_parts import RunDiff, RunFiles, SqlBox
from app.components.history_table import HistoryTable
from app.components.numbers import metric_title
from app.components.vega_chart import VegaChart, vega_bundle
from app.context import Context
from app.hosted import READ_ONLY
from studio_state.errors import StoreError, StudioError
from studio_state.runcard import MAX_BYTES
from studio_state.store import Store

TITLE = "Compare"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
DIRECT: dict[str, Any] = {**PRIVATE, "queue": False}
Ask = Callable[[Any], dict[str, Any]]


class _Page:
    """The components of the page that events use."""

    history: HistoryTable
    files: RunFiles
    x: gr.Dropdown
    y: gr.Dropdown
    pareto: VegaChart
    sweeps: VegaChart
    latency: VegaChart
    diff: RunDiff


def build(ctx: Context) -> None:
    """Lay out the page inside the current Blocks and wire it."""
    if ctx.store is None:
        raise ValueError("the compare page needs the record: Context(store=...)")
    page = _layout(ctx, ctx.store)
    _wire(ctx, ctx.store, page)


def _layout(ctx: Context, store: Store) -> _Page:
    page, bundle = _Page(), vega_bundle(ctx.data.cache)
    gr.set_static_paths([bundle.parent])
    page.history = HistoryTable(
        history_page=_answering("history_page", lambda q: history_rows(store, q)),
        history_act=_answering("history_act", _changing(ctx, lambda q: act(store, q))),
        most=MAX_PICKED, elem_id="history",
    )  # fmt: skip
    page.files = RunFiles(
        export_file=_answering("export_file", lambda q: export_files(store, q)),
        import_file=_answering("import_file", _changing(ctx, lambda q: import_file(store, q))),
        most_bytes=MAX_BYTES, elem_id="run-files",
    )  # fmt: skip
    with gr.Row(elem_classes="cp-axes"):
        page.x = gr.Dropdown([], label="Speed or memory", elem_id="axis-x", min_width=270, scale=0, interactive=True)
        page.y = gr.Dropdown([], label="Quality", elem_id="axis-y", min_width=270, scale=0, interactive=True)
    page.pareto = VegaChart(bundle=bundle, value=pareto_figure([], None, None, None), elem_id="pareto")
    page.diff = RunDiff(diff_runs=_answering("diff_runs", lambda q: _diff(ctx, store, q)), elem_id="diff")
    page.sweeps = VegaChart(bundle=bundle, value=sweep_figure([], ctx.catalog, None, None), elem_id="sweeps")
    page.latency = VegaChart(bundle=bundle, value=latency_figure(store, []), elem_id="latency")
    with gr.Accordion("SQL over the history", open=False, elem_id="sql-box"):
        SqlBox(run_query=_answering("run_query", lambda q: answer_query(store, str(q or ""))), examples=EXAMPLES, elem_id="sql")
    return page


def _answering(name: str, work: Ask) -> Ask:
    """A function for the browser under this name; its errors become ``{"error": sentence}``."""

    def answer(request: Any) -> dict[str, Any]:
        try:
            return work(request)
        except StudioError as e:
            return {"error": sentence_of(e)}

    answer.__name__ = name
    return answer


def _changing(ctx: Context, work: Ask) -> Ask:
    """What changes the record that all visitors see; refused in a hosted studio."""

    def answer(request: Any) -> dict[str, Any]:
        if ctx.hosted:
            raise StoreError(READ_ONLY)
        return work(request)

    return answer


def sentence_of(error: StudioError) -> str:
    """An error as a sentence that begins with a capital, unless it begins with the name of a file."""
    text = str(error)
    return text if "." in text.split(" ", 1)[0] else text[:1].upper() + text[1:]


def _diff(ctx: Context, store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two of the picked runs; they keep the names and marks that they have on the page."""
    by_id = {p.id: p for p in load_picked(store, request.get("runs") or [])}
    pair = [by_id.get(str(request.get(side))) for side in ("a", "b")]
    if pair[0] is None or pair[1] is None:
        return {"error": "One of these runs is not in the history any more; pick again."}
    return diff_of(read_side(store, pair[0]), read_side(store, pair[1]), ctx.catalog)


def _wire(ctx: Context, store: Store, page: _Page) -> None:
    def charts(picked: list[Picked], x: str | None, y: str | None) -> tuple[Any, Any]:
        band = baseline_band(store, picked, x, y)
        return pareto_figure(picked, x, y, band), sweep_figure(picked, ctx.catalog, x, y, band)

    def show(ids: list[str], x: str | None, y: str | None) -> tuple[Any, ...]:
        picked = load_picked(store, ids)
        xs, ys = speed_and_memory(picked), quality(picked)
        x = x if x in xs else next(iter(xs), None)
        y = y if y in ys else default_quality(picked)
        style = table_style(picked)
        return (
            gr.update(names=style), gr.update(choices=_titled(xs), value=x), gr.update(choices=_titled(ys), value=y),
            *charts(picked, x, y), latency_figure(store, picked), _diff_value(picked), {"picked": [p.id for p in picked]},
        )  # fmt: skip

    def redraw(ids: list[str], x: str | None, y: str | None) -> tuple[Any, Any]:
        return charts(load_picked(store, ids), x, y)

    def select(ids: list[str], event: gr.EventData) -> Any:
        return _diff_value(load_picked(store, ids), str(event.run))

    everything = [page.history, page.x, page.y]
    drawn = [page.history, page.x, page.y, page.pareto, page.sweeps, page.latency, page.diff, page.files]
    page.history.change(show, everything, drawn, trigger_mode="always_last", **DIRECT)
    for axis in (page.x, page.y):
        axis.input(redraw, everything, [page.pareto, page.sweeps], **DIRECT)
    page.pareto.select(select, page.history, page.diff, **DIRECT)
    page.files.upload(lambda: gr.update(reload=_next()), None, page.history, **DIRECT)


def _titled(names: list[str]) -> list[tuple[str, str]]:
    return [(metric_title(n), n) for n in names]


_reloads = iter(range(1, 2**62))


def _next() -> int:
    """A number that was not given before: the browser reads the history anew when it changes."""
    return next(_reloads)


def _diff_value(picked: list[Picked], chosen: str | None = None) -> dict[str, Any]:
    """What the difference shows: the chosen run against its own reference lane, else the first two."""
    value: dict[str, Any] = {"runs": table_style(picked)}
    b = next((p for p in picked if p.id == chosen), None)
    if b is not None:
        row = b.run.experiment
        own = f"{row.id}/{row.reference or 0}"
        others = [p.id for p in picked if p is not b]
        base = next((p.id for p in picked if p.is_baseline and p is not b and p.group == b.group), None)
        value |= {"a": own if own in others else base or next(iter(others), ""), "b": b.id}
    return value
