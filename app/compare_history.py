"""The history table as plain data, and what a person does there: tag, note, delete, undo. All of it goes through the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from app.compare_runs import QUALITY_FIRST, clock_time, id_of, model_title, short_name
from app.components.numbers import metric_quantity, metric_title, ratio_text
from studio_state.errors import StoreError
from studio_state.history import History
from studio_state.history_page import PAGE_ROWS, Run, read_page
from studio_state.journal import Delete, Entry, Tag, Undelete, Untag, WriteNote
from studio_state.store import Store

STATUSES = ("finished", "running", "queued", "failed", "cancelled", "interrupted")
FILTERS = ("text", "model", "workload", "status", "tag")
_HEADLINES = (
    ("decode_tokens_per_s", "images_per_s", "score_tokens_per_s"),
    ("kv_bytes", "weight_bytes"),
    ("peak_memory_bytes",),
    QUALITY_FIRST,
)
_MEMORY_RATIOS = ("kv_bytes", "weight_bytes")


def history_rows(history: History, query: Mapping[str, Any]) -> dict[str, Any]:
    """One page of the table with the choices of its filters.

    Args:
        query: ``page`` from 0, ``deleted``, and the texts of ``FILTERS``; empty = any.
    """
    filters = {f: str(query.get(f) or "").strip() or None for f in FILTERS}
    deleted, page = bool(query.get("deleted")), max(0, int(query.get("page") or 0))
    found = read_page(history, page, PAGE_ROWS, deleted=deleted, **filters)
    if not found.experiments and found.total:  # the last page became shorter
        page = (found.total - 1) // PAGE_ROWS
        found = read_page(history, page, PAGE_ROWS, deleted=deleted, **filters)
    return {
        "page": page,
        "pages": max(1, -(-found.total // PAGE_ROWS)),
        "total": found.total,
        "empty": _empty(history, filters, deleted) if not found.total else "",
        "choices": {
            "model": [[m, model_title(m)] for m in history.values("model")],
            "workload": [[w, w] for w in history.values("workload")],
            "status": [[s, s] for s in STATUSES],
            "tag": [[t, t] for t in history.tags()],
        },
        "experiments": [
            {
                "id": e.id, "when": clock_time(e.submitted), "model": model_title(e.model), "workload": e.workload or "", "device": e.device or "",
                "status": e.status, "error": e.error or "", "origin": e.origin or "", "tags": list(e.tags), "note": e.note, "deleted": e.deleted,
                "lanes": [lane_row(run) for run in found.runs[e.id]],
            }
            for e in found.experiments
        ],
    }  # fmt: skip


def _empty(history: History, filters: Mapping[str, str | None], deleted: bool) -> str:
    if deleted:
        return "Nothing is deleted. What you delete can be brought back here."
    if any(filters.values()):
        return "No experiment fits these filters; clear them to see all."
    if history.count(deleted=True):
        return "All experiments are deleted; tick 'Deleted' to bring some back, or run a new one in the Studio tab."
    return "No runs yet. Put a policy into a lane in the Studio tab and press Run, or import a run card below: every run appears here and stays."


def lane_row(run: Run) -> dict[str, Any]:
    """One lane: name, and one headline number each for speed, memory and quality."""
    return {
        "id": id_of(run.key),
        "name": short_name(run),
        "pipeline": run.row.pipeline,
        "status": run.row.status,
        "flags": [*run.row.flags, *([run.row.message] if run.row.message else [])],
        "baseline": not run.row.steps.get("steps"),
        "cells": [_headline(run, names) for names in _HEADLINES],
    }


def _headline(run: Run, names: tuple[str, ...]) -> dict[str, str]:
    """The first of these metrics that the run has; for KV and weights the one that its pipeline changes."""
    given = [n for n in names if run.value(n) is not None]
    if names == _MEMORY_RATIOS:
        given.sort(key=lambda n: run.ratios[n].value == 1.0 if n in run.ratios else False)
    if not given:
        return {"text": "", "unit": "", "what": "", "ratio": ""}
    name = given[0]
    q, ratio = metric_quantity(name, run.value(name)), run.ratios.get(name)
    return {"text": q.text, "unit": q.unit, "what": metric_title(name), "ratio": ratio_text(ratio.value) if ratio else ""}


def act(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
    """Do one thing to some experiments and say so; ``undo`` is the request that takes it back.

    Args:
        request: ``{do: tag | untag | note | delete | undelete, experiments: [id], text}``.

    Raises:
        StoreError: the journal cannot be written, the text is too long, or there is no such experiment.
    """
    ids = [str(x) for x in request.get("experiments") or []]
    rows = {row.id: row for row in store.experiments_of(ids)}
    do, text = str(request.get("do")), str(request.get("text") or "").strip()
    if not ids or set(ids) - rows.keys():
        raise StoreError("this experiment is not in the history any more; reload the page")
    if do in ("tag", "untag"):  # only where it changes something, so that undo restores exactly that
        ids = [x for x in ids if (text in rows[x].tags) == (do == "untag")] or ids
    entries: list[Entry] = []
    try:
        for x in ids:
            match do:
                case "tag":
                    entries.append(Tag(experiment=x, tag=text))
                case "untag":
                    entries.append(Untag(experiment=x, tag=text))
                case "note":
                    entries.append(WriteNote(experiment=x, text=text))
                case "delete":
                    entries.append(Delete(experiment=x))
                case "undelete":
                    entries.append(Undelete(experiment=x))
                case _:
                    raise StoreError(f"the history cannot {do!r}; it can tag, untag, note, delete and undelete")
    except ValidationError as e:
        limit = "a tag has 1 to 100 characters" if do in ("tag", "untag") else "a note has at most 100,000 characters"
        raise StoreError(f"{limit}; this one has {len(text)}") from e
    store.record(*entries)
    back = {"tag": "untag", "untag": "tag", "delete": "undelete", "undelete": "delete", "note": "note"}[do]
    undo = {"do": back, "experiments": ids, "text": rows[ids[0]].note if do == "note" else text}
    return {"message": _said(do, ids, text), "undo": undo}


def _said(do: str, ids: list[str], text: str) -> str:
    what = "1 experiment" if len(ids) == 1 else f"{len(ids)} experiments"
    return {
        "tag": f"Tagged {what} '{text}'.",
        "untag": f"Took the tag '{text}' off {what}.",
        "note": "Saved the note." if text else "Removed the note.",
        "delete": f"Deleted {what}. The measurements stay on the disk.",
        "undelete": f"Brought {what} back.",
    }[do]
