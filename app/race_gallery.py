"""The grid of all pictures of a race, and the pictures themselves: each leaves here once. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from app.race import Race
from app.race_drawn import compared, distance, drawing, sight
from app.race_images import made_picture, pictured, source
from app.race_names import name_of
from app.race_parts import Item
from studio_state.events import Output

Section = dict[str, Any]

AT_ONCE = 600_000  # characters of new pictures in one message


def gallery(race: Race, since: int, item_id: str | None = None, ahead: Collection[str] = ()) -> Section:
    """What is new in the grid of all pictures: every picture once, and the marks of the items that changed.

    Args:
        since: ``upto`` of the last answer; -1 = nothing was told yet.
        item_id: the item looked at; its pictures come first.
        ahead: keys of pictures that came first before their turn: an item, or ``item/lane`` of a drawn one.

    Returns:
        ``upto`` and ``rows``. A row has ``src`` where the item's picture is new, ``drawn`` (lane -> picture) where a lane's
        is, and ``previews`` (lane -> the newest look at it on its way).
    """
    draws = drawing(race)
    upto = _portion(race, since, draws)
    shown = _looked_at(race, item_id, draws)
    rows = []
    for item in race.items.values():
        if item.picture is None and not draws:
            continue
        pictures = {
            key: source(mime, data)
            for key, seq, mime, data in _pictures(item, draws)
            if key not in ahead and (since < seq <= upto or (item.id in shown and seq > upto))
        }
        if pictures or any(since < seq <= upto for seq in _changes(item)):
            rows.append(_row(race, item, pictures, since, upto, draws))
    return {"experiment": race.experiment, "upto": upto, "rows": rows}


def keys_of(row: Section) -> set[str]:
    """Keys of the pictures in a row of :func:`gallery`."""
    return ({row["id"]} if "src" in row else set()) | {f"{row['id']}/{lane}" for lane in row.get("drawn", {})}


def _looked_at(race: Race, item_id: str | None, draws: bool) -> set[str]:
    """Ids of the items whose pictures are on the page besides the grid."""
    found = (race.items.get(item_id or race.current or ""), compared(race, item_id)) if draws else (pictured(race, item_id),)
    return {item.id for item in found if item is not None}


def _pictures(item: Item, draws: bool) -> Iterator[tuple[str, int, str, str]]:
    """Key, seq, format and base64 data of every picture of an item that is there for good."""
    if item.picture is not None:
        yield item.id, item.picture.seq, item.picture.mime, item.picture.data
    for lane, stream in item.streams.items():
        if draws and stream.outcome is not None and (data := made_picture(stream.outcome)):
            yield f"{item.id}/{lane}", stream.outcome.seq, "image/png", data


def _changes(item: Item) -> Iterator[int]:
    """When something changed in the tile of an item."""
    yield item.measured
    for stream in item.streams.values():
        if stream.outcome is not None:
            yield stream.outcome.seq
        elif stream.preview is not None:
            yield stream.preview.seq


def _portion(race: Race, since: int, draws: bool) -> int:
    """The last event of the next message: everything, or as many pictures as go into one, but at least one."""
    sizes = [(seq, len(data)) for item in race.items.values() for _, seq, _, data in _pictures(item, draws)]
    looks = [s.preview for item in race.items.values() for s in item.streams.values() if s.preview is not None]
    new = [(seq, size) for seq, size in [*sizes, *((p.seq, len(p.data)) for p in looks)] if seq > since]
    size, before = 0, None
    for seq, length in sorted(new):
        size += length
        if before is not None and size > AT_ONCE:
            return before
        before = seq
    return max(since, race.seq)


def _row(race: Race, item: Item, pictures: dict[str, str], since: int, upto: int, draws: bool) -> Section:
    """One tile with what is new of its pictures."""
    row = _tile(race, item)
    if item.id in pictures:
        row["src"] = pictures[item.id]
    if draws:
        lanes = range(len(race.lanes))
        row["asked"] = race.prompts.get(item.id, "")
        row["label"] = row["label"].replace(":", f", {row['asked']}:", 1) if row["asked"] else row["label"]
        row["lanes"] = [_cell(race, item, lane) for lane in lanes]
        row["drawn"] = {str(lane): src for lane in lanes if (src := pictures.get(f"{item.id}/{lane}"))}
        row["previews"] = {
            str(lane): source("image/png", s.preview.data)
            for lane, s in item.streams.items()
            if s.preview is not None and since < s.preview.seq <= upto
        }
    return row


def _cell(race: Race, item: Item, lane: int) -> Section:
    """A lane's picture in the tile of its item: what the judge sees, and how far it is from the baseline's."""
    outcome = _end(item, lane)
    return {"sees": outcome.text if outcome else "", **distance(race, lane, item)}


def _end(item: Item, lane: int) -> Output | None:
    stream = item.streams.get(lane)
    return stream.outcome if stream else None


def _tile(race: Race, item: Item) -> Section:
    """One thumbnail: per lane ``right``, ``wrong``, ``done`` (nothing to judge) or empty, and whether it differs."""
    reference = race.spec.reference if race.spec else 0
    ends = [_end(item, lane) for lane in range(len(race.lanes))]
    base = ends[reference] if reference < len(ends) else None
    states = ["" if e is None else {True: "right", False: "wrong", None: "done"}[e.correct] for e in ends]
    differs = [e is not None and base is not None and e.text.strip() != base.text.strip() for e in ends]
    words = [
        _words(race, item, lane, e, states[lane])
        + (f", differs from {name_of(race, reference).lower()}" if differs[lane] else "")
        for lane, e in enumerate(ends)
        if e is not None
    ]
    return {
        "id": item.id,
        "index": item.index,
        "states": states,
        "differs": differs,
        "label": f"Item {item.index + 1}: " + ("; ".join(words) or "not there yet"),
    }


def _words(race: Race, item: Item, lane: int, outcome: Output, state: str) -> str:
    """``Baseline right``; of a drawn picture also what the judge sees in it, and its distance."""
    name = name_of(race, lane)
    if outcome.kind != "image" or item.picture is not None:
        return f"{name} {state}"
    parts = [sight(outcome), state if state != "done" or not outcome.text else "", distance(race, lane, item)["words"]]
    return f"{name} {', '.join(p for p in parts if p)}"
