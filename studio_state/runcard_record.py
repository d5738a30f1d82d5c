"""Run cards and the record: making one from a spool, and keeping an imported one as an experiment."""

from __future__ import annotations

from collections.abc import Iterable

from studio_state import events as ev
from studio_state.journal import Import, append_entries
from studio_state.paths import DataDir
from studio_state.runcard import CardLane, RunCard, Spread, make_card
from studio_state.spool import SpoolWriter, new_experiment_id, read_spool


def export_card(data: DataDir, experiment: str) -> RunCard:
    """The card of a recorded experiment.

    Raises:
        StoreError: there is none with this id, or it has not ended yet.
    """
    return make_card(read_spool(data.spool(experiment)))


def import_card(data: DataDir, card: RunCard, source: str, by: str = "") -> str:
    """Put a card into the record as an experiment of its own; returns its new id.

    The card itself is kept as an artifact under the digest that the journal entry names.

    Args:
        source: where it came from, for the history: a file name.

    Raises:
        StoreError: it cannot be recorded.
    """
    experiment = new_experiment_id()
    digest = data.keep_artifact(card.text().encode())
    with SpoolWriter(data.spool(experiment)) as spool:
        spool.append_all(events_of(card))
    append_entries(data.journal, [Import(experiment=experiment, by=by, source=source, digest=digest)])
    return experiment


def events_of(card: RunCard) -> list[ev.Event]:
    """The events that stand for a card: its spec, environment, numbers and end; outputs without their text."""
    run = card.experiment
    t = {"t": run.submitted_at} if run.submitted_at is not None else {}
    found: list[ev.Event] = [ev.Submitted(spec=run.spec, origin="import", **t), ev.Started(environment=run.environment, **t)]
    if run.model:
        found.append(ev.ModelLoaded(info=run.model, **t))
    found.append(ev.Note(text=f"imported from a run card of experiment {run.id}", **t))
    for lane in card.lanes:
        found += _lane_events(lane, t)
    end: dict[str, ev.Event] = {
        "finished": ev.Finished(seconds=run.seconds or 0.0, **t),
        "failed": ev.Failed(message=run.message, **t),
    }
    return [*found, end.get(run.status, ev.Cancelled(message=run.message or "cancelled", **t))]


def _lane_events(lane: CardLane, t: dict[str, float]) -> Iterable[ev.Event]:
    i = lane.lane
    yield ev.LaneStarted(lane=i, order=lane.order, interleaved=lane.interleaved, **t)
    for o in lane.outputs:
        data = {"digest": o.digest, "tokens": o.tokens}
        yield ev.Output(lane=i, item=o.item, repeat=o.repeat, kind=o.kind, correct=o.correct, data=data, **t)
    for name, value in lane.metrics.items():
        spread = lane.intervals.get(name, Spread())
        source = lane.sources.get(name, "measured")
        yield ev.Metric(lane=i, name=name, value=value, source=source, n=spread.n, low=spread.low, high=spread.high, **t)
    for name, r in lane.ratios.items():
        yield ev.Ratio(lane=i, name=name, value=r.value, low=r.low, high=r.high, n=r.n or 0, **t)
    if lane.status in ("finished", "failed", "cancelled", "refused", "unavailable"):
        yield ev.LaneFinished(
            lane=i, status=lane.status, flags=lane.flags, message=lane.message, interleaved=lane.interleaved, **t
        )
