"""Running the lanes over the items, and what is told of it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from studio_state.errors import ModelError, StudioError, WorkloadError
from studio_state.events import Analysis, Event, ItemStarted, LaneStarted, Note, Output, Phase
from studio_state.metrics import Source
from workers.analyzer import Measured, analyzers
from workers.families.base import RunTrace
from workers.lanes import Lane, live
from workers.mechanisms.phases import ShortRun
from workers.mechanisms.weight_policy import ledger, weight_metrics
from workers.meters.memory import peak_allocated, resident_bytes
from workers.meters.speed import speed
from workers.meters.summary import so_far, summarize
from workers.session import Cancelled, Session
from workers.telling import (
    Teller,
    batch_key,
    cache_map_event,
    expert_load_event,
    first_difference,
    image_tokens_event,
    kept_event,
    picture_event,
)
from workers.workloads.base import Item, Workload

OUTPUTS = {
    "generate": "text",
    "score": "score",
    "choose": "choice",
    "classify": "label",
    "draw": "image",
}  # task -> kind of output
SOURCES: dict[str, Source] = {
    **dict.fromkeys(("theoretical_weight_bytes", "table_operations"), "estimated"),
    **dict.fromkeys(("simulated_area", "simulated_energy"), "simulated"),
}  # of what was not measured
WARMUP_RUNS = 5  # warm-up ends when two runs differ by less than 5 %, or after this many
WARMUP_SECONDS = 10.0
MEMORY_NEW_TOKENS = 8  # new tokens in the untimed memory pass


class Race:
    """The lanes of one experiment.

    Attributes:
        current: lanes of the running block; all of them, where they fit into memory together.
        references: what the baseline made of each batch, while other lanes still need it.
    """

    def __init__(self, session: Session, workload: Workload, lanes: list[Lane]):
        self.session, self.workload, self.lanes = session, workload, lanes
        self.current = lanes
        self.shown: set[str] = set()
        self.references: dict[str, RunTrace] = {}

    def live(self) -> list[Lane]:
        """Lanes of the running block that still run."""
        return live(self.current)

    @contextmanager
    def block(self, lanes: list[Lane], interleaved: bool) -> Iterator[None]:
        """Run only these lanes for a while."""
        for lane in lanes:
            lane.interleaved = interleaved
        self.current = lanes
        try:
            yield
        finally:
            self.current = self.lanes

    # -- before ----------------------------------------------------------------------------
    def prepare(self, load_seconds: float, first: Item) -> Iterator[Event]:
        """Build what the lanes need and warm them up.

        Args:
            first: the item that comes first.
        """
        for lane in self.live():
            yield LaneStarted(lane=lane.index, order=lane.order, interleaved=lane.interleaved)
            yield Phase(name="build", lane=lane.index)
            start = self.session.clock()
            try:
                with lane.attached(prepare=True):
                    built = self.session.clock() - start
                    for name, value in weight_metrics(self.session).items():
                        yield lane.whole(name, value, SOURCES.get(name, "measured"))
                    books = ledger(self.session)
                    if books and not books.agrees:
                        lane.flags.append(books.complaint())
            except Cancelled:
                raise
            except Exception as e:
                yield from self._lane_failed(lane, e)
                continue
            yield lane.whole("load_s", load_seconds)
            yield lane.whole("build_s", built if lane.policies else 0.0)
        for i, lane in enumerate(self.live()):
            yield Phase(name="warmup", lane=lane.index, done=i / max(1, len(self.live())))
            start = self.session.clock()
            try:
                with lane.attached():
                    self._warm_up(first)
            except Cancelled:
                raise
            except Exception as e:
                yield from self._lane_failed(lane, e)
                continue
            lane.acted.clear()
            yield lane.whole("warmup_s", self.session.clock() - start)

    def _warm_up(self, first: Item) -> None:
        family = self.session.family
        item = family.warm_up_item(self.session, first)
        began, before = time.perf_counter(), 0.0
        spec = self.session.spec.model_copy(update={"max_new_tokens": item.max_new_tokens, "chunk_size": None})
        with self.session.having(spec=spec):
            require_numbers(family.probe(self.session, item))
            for _ in range(WARMUP_RUNS):
                trace = family.begin(self.session, [item])
                seconds = sum(step.seconds for step in family.run(self.session, trace))
                if abs(seconds - before) < 0.05 * seconds or time.perf_counter() - began > WARMUP_SECONDS:
                    return
                before = seconds

    # -- the items -------------------------------------------------------------------------
    def run(self, batches: Sequence[list[Item]]) -> Iterator[Event]:
        """All items, all repeats, lanes in rotating order; then the quality of each item."""
        repeats = self.session.spec.repeats
        total, items = len(batches) * repeats, sum(map(len, batches))
        turn = 0
        for repeat in range(repeats):
            number = 0  # of the batch's first item
            for batch in batches:
                traces: dict[int, RunTrace] = {}
                running = self.live()
                for lane in running[turn % max(1, len(running)) :] + running[: turn % max(1, len(running))]:
                    yield Phase(name="run", lane=lane.index, done=turn / total)
                    try:
                        trace = yield from self._item(lane, batch, number, items, repeat)
                    except Cancelled:
                        raise
                    except Exception as e:
                        yield from self._lane_failed(lane, e)
                        continue
                    traces[lane.index] = trace
                turn += 1
                number += len(batch)
                yield from so_far(self.current, self.session.spec.reference) if len(self.current) == len(self.lanes) else ()
                if repeat == 0:
                    yield Phase(name="quality", done=turn / total)
                    yield from self._quality(batch, traces)
        yield Phase(name="run", done=1.0)

    def _item(self, lane: Lane, batch: list[Item], number: int, of: int, repeat: int) -> Iterator[Event]:
        session, family = self.session, self.session.family
        with lane.attached():
            trace = family.begin(session, batch)
            for row, item in enumerate(batch):
                first = item.id not in self.shown
                self.shown.add(item.id)
                image = trace.images[row] if row < len(trace.images) else None
                if first and image is not None:
                    yield picture_event(item.id, image)
                prompt, pieces = (trace.prompts[row], trace.pieces[row]) if first else ("", [])
                yield ItemStarted(
                    lane=lane.index, item=item.id, index=number + row, of=of, repeat=repeat, prompt=prompt, pieces=pieces
                )
            teller = Teller(lane.index, batch, repeat)
            for step in family.run(session, trace):
                yield from teller.heard(step)
            yield from teller.rest()
        yield from self._measured(lane, trace, repeat)
        return trace

    def _measured(self, lane: Lane, trace: RunTrace, repeat: int) -> Iterator[Event]:
        key = batch_key(trace.items)
        for name, value in {**speed(trace), **trace.counts}.items():
            yield lane.sample(name, value, key, repeat)
        yield lane.whole("worker_rss_bytes", float(resident_bytes()))
        if repeat:
            return
        for row, result in enumerate(trace.results):
            grade = self.workload.grade(result)
            lane.results.append(result)
            lane.grades.append(grade)
            for name, value in grade.metrics.items():
                yield lane.sample(name, value, result.item.id)
            kind = "image" if "image" in result.data else OUTPUTS[result.item.task]
            yield Output(
                lane=lane.index,
                item=result.item.id,
                kind=kind,  # type: ignore[arg-type]
                text=grade.text or result.text,
                expected=result.item.expected,
                correct=grade.correct,
                data={**grade.data, **result.data, **({"token_ids": result.token_ids} if result.token_ids else {})},
            )
            if row < len(trace.seen) and trace.seen[row].layout is not None:
                yield image_tokens_event(lane.index, result.item.id, trace.seen[row])
            if row < len(trace.kept) and any(min(layer, default=1.0) < 1 for layer in trace.kept[row]):
                yield kept_event(lane.index, result.item.id, trace.kept[row])
            if row < len(trace.frames) and trace.frames[row]:
                yield cache_map_event(self.session, lane.index, trace, row)
            if row < len(trace.experts):
                yield expert_load_event(lane.index, result.item.id, trace.experts[row])

    # -- quality ---------------------------------------------------------------------------
    def _quality(self, batch: list[Item], traces: dict[int, RunTrace]) -> Iterator[Event]:
        """Distance of every lane's distributions and outputs from the baseline's, untimed."""
        family, key = self.session.family, batch_key(batch)
        generates = batch[0].task == "generate"
        for index, trace in sorted(traces.items()):  # the baseline first: the others follow its outputs
            lane, reference = self.lanes[index], traces[0] if index == 0 else self.references.get(key)
            if reference is None:
                continue
            try:
                followed = self._followed(lane, batch, reference, trace) if generates else trace
                require_numbers(followed)
            except Cancelled:
                raise
            except Exception as e:
                yield from self._lane_failed(lane, e)
                continue
            if index == 0:
                self.references[key] = reference = followed
            for item, values in zip(batch, family.compare(reference, followed), strict=True):
                for name, value in values.items():
                    yield lane.sample(name, value, item.id)
            if generates:
                for mine, theirs in zip(trace.results, reference.results, strict=True):
                    same = first_difference(mine, theirs)
                    yield lane.sample("first_divergence", float(same), mine.item.id)
                    yield lane.sample("same_output", float(mine.token_ids == theirs.token_ids), mine.item.id)
        for trace in traces.values():
            if trace is not self.references.get(key):
                trace.logits = []
        if len(traces) == len(live(self.lanes)):  # no other block will ask for it
            self.references.pop(key, None)

    def _followed(self, lane: Lane, batch: list[Item], reference: RunTrace, own: RunTrace) -> RunTrace:
        with lane.attached():
            trace = self.session.family.follow(self.session, batch, reference)
        trace.results = own.results
        return trace

    # -- after -----------------------------------------------------------------------------
    def measure_memory(self, batches: Sequence[list[Item]]) -> Iterator[Event]:
        """The untimed memory pass of every lane, on the longest batch."""
        longest = max(batches, key=lambda b: max(len(i.prompt) + 4 * len(i.prompt_ids) for i in b))
        for lane in self.live():
            yield Phase(name="memory", lane=lane.index)
            try:
                peak = self._peak(lane, longest)
            except Cancelled:
                raise
            except Exception as e:
                yield from self._lane_failed(lane, e)
                continue
            yield lane.whole("peak_activation_bytes", float(peak))
            yield lane.whole("peak_memory_bytes", peak + lane.given["weight_bytes"])
            lane.check_effect()

    def analyze(self, batches: Sequence[list[Item]]) -> Iterator[Event]:
        """What the experiment's analyzers find of every lane, on its first batch; an analyzer that fails costs the lane nothing."""
        known = analyzers()
        for lane in self.live():
            run = ShortRun(self.session, lane.attached_for, batches[0])
            for name in self.session.spec.analyzers:
                yield Phase(name="analyze", lane=lane.index, text=known[name].card.title)
                acted = dict(lane.acted)
                analyzer = known[name]()
                try:
                    data = analyzer.analyze(run)
                    yield Analysis(lane=lane.index, analyzer=name, data=data)
                    for metric in analyzer.metrics(data):
                        yield from _taken(lane, metric, batches[0][0].id)
                except Cancelled:
                    raise
                except Exception as e:
                    text = f"{analyzer.card.title}: {type(e).__name__}: {e}; the lane's measurements are not touched by this"
                    yield Note(text=text, level="warning", lane=lane.index)
                lane.acted.clear()
                lane.acted.update(acted)

    def finish(self) -> Iterator[Event]:
        """The summaries, the ratios, the farewells."""
        yield from summarize(self.lanes, self.workload, self.session.spec.reference)
        for lane in live(self.lanes):
            lane.status = "finished"
            yield from lane.farewell()

    def _peak(self, lane: Lane, batch: list[Item]) -> int:
        session = self.session
        spec = session.spec.model_copy(update={"max_new_tokens": MEMORY_NEW_TOKENS})
        acted = dict(lane.acted)

        def work() -> None:
            trace = session.family.begin(session, batch)
            for _ in session.family.run(session, trace):
                session.check_cancelled()

        with lane.attached(), session.having(spec=spec):
            peak = peak_allocated(session, work)
        lane.acted.clear()
        lane.acted.update(acted)
        return peak

    def _lane_failed(self, lane: Lane, error: Exception) -> Iterator[Event]:
        """A lane that fails leaves the others running."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            message = "the device ran out of memory in this lane; use a smaller batch, a shorter prompt or stronger compression"
        elif isinstance(error, StudioError):
            message = str(error)
        else:
            message = f"{type(error).__name__}: {error}"
            yield Note(text="".join(traceback.format_exception(error))[-4000:], level="warning", lane=lane.index)
        if isinstance(error, WorkloadError) and lane.index == 0:
            raise error
        lane.give_up("failed", message)
        yield from lane.farewell()


def _taken(lane: Lane, metric: Measured, item: str) -> Iterator[Event]:
    """What an analyzer measured, as the lane's own; several passes as repeats of the item that it ran on."""
    if len(metric.values) == 1:
        yield lane.whole(metric.name, metric.values[0], metric.source)
        return
    for i, value in enumerate(metric.values):
        yield lane.sample(metric.name, value, item, i)


def require_numbers(trace: RunTrace) -> None:
    """Refuse distributions that are none: without this, a broken lane would agree with a broken baseline.

    Raises:
        ModelError: a log-probability is NaN.
    """
    if any(bool(logits.isnan().any()) for logits in trace.logits):
        raise ModelError(
            "the model's output is not a number (NaN) in this lane: its weights are damaged, or a number overflowed; "
            "run it with --dtype float32, with other knobs, or fetch the model again"
        )
