"""Files of the compare page: picked runs out as CSV, Parquet, run cards or scripts, a run card in."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from app.compare_runs import key_of
from app.script_export import export_script
from studio_state.catalog import Catalog
from studio_state.errors import StoreError
from studio_state.export import Kind, export_runs
from studio_state.runcard import card_from_bytes
from studio_state.runcard_record import export_card, import_card
from studio_state.spool import read_spool
from studio_state.store import Store

MAX_CARDS = 8
_MIME = {"csv": "text/csv", "parquet": "application/vnd.apache.parquet", "card": "application/json", "script": "text/x-python"}


def export_files(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
    """The files asked for, as base64.

    Args:
        request: ``{kind: csv | parquet | card | script, picked: [experiment/lane]}``. A card holds a whole
            experiment, a script one lane.

    Raises:
        SpecError: no script can be made of a picked run.
        StoreError: nothing is picked, a run is not in the record or has not ended, too many cards.
    """
    kind, keys = str(request.get("kind")), [k for k in map(key_of, map(str, request.get("picked") or [])) if k]
    if kind not in _MIME:
        raise StoreError(f"there is no export {kind!r}; choose csv, parquet, card or script")
    if not keys:
        raise StoreError("there is nothing to export: pick at least one run")
    if kind == "script":
        if len(keys) > MAX_CARDS:
            raise StoreError(f"{len(keys)} runs are picked; at most {MAX_CARDS} scripts are saved at once: pick fewer")
        return {"files": [_script(store, experiment, lane) for experiment, lane in keys]}
    if kind != "card":
        chosen: Kind = "csv" if kind == "csv" else "parquet"
        return {"files": [_file(f"runs.{kind}", kind, export_runs(store, keys, chosen))]}
    experiments = list(dict.fromkeys(x for x, _ in keys))
    if len(experiments) > MAX_CARDS:
        raise StoreError(
            f"the picked runs are of {len(experiments)} experiments; at most {MAX_CARDS} run cards are saved at once: pick fewer"
        )
    return {"files": [_file(f"run-card-{x}.json", kind, export_card(store.data, x).text().encode()) for x in experiments]}


def _script(store: Store, experiment: str, lane: int) -> dict[str, str]:
    name = f"{experiment}-lane-{lane}.py"
    text = export_script(read_spool(store.data.spool(experiment)), lane, Catalog.load(), name)
    return _file(name, "script", text.encode())


def _file(name: str, kind: str, content: bytes) -> dict[str, str]:
    return {"name": name, "mime": _MIME[kind], "base64": base64.b64encode(content).decode()}


def import_file(store: Store, request: Mapping[str, Any]) -> dict[str, Any]:
    """Take a run card into the record.

    Args:
        request: ``{name, base64}``.

    Raises:
        SpecError: it is no run card, or one that must be refused.
        StoreError: it cannot be recorded.
    """
    name = str(request.get("name") or "this file")[:200]
    try:
        raw = base64.b64decode(str(request.get("base64") or ""), validate=True)
    except binascii.Error as e:
        raise StoreError(f"{name} did not arrive whole; choose it again") from e
    card = card_from_bytes(raw, name)
    experiment = import_card(store.data, card, source=name)
    store.refresh()
    store.flush()
    return {"experiment": experiment, "message": f"Imported {name} as experiment {experiment}; it is in the history above."}
