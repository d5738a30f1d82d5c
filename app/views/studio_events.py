"""What happens on the studio page: every handler takes what stands on the page and returns what it shows next."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import gradio as gr

from app.components.facts import facts, notice
from app.components.knob_form import form_value
from app.compose import make_spec, path_problems, read_lanes, settings_schema
from app.context import Context
from app.estimate import estimate_seconds, estimate_text
from app.hosted import READ_ONLY
from app.models import memory_rows, model_rows, pending_rows
from app.run_service import refusals, sentence, sentences, start
from app.views.shared_link import link_of, read_link
from studio_state.catalog import Catalog, WorkloadCard
from studio_state.errors import SpecError, StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.problems import Problem

Data = dict[str, Any]


class OnPage(NamedTuple):
    """What stands on the page, in the order of ``StudioPage.everything``."""

    model: str
    workload: str
    options: Data
    settings: Data
    device: str
    lanes: list[Data]

    def spec(self) -> ExperimentSpec:
        """The experiment.

        Raises:
            SpecError: it is not one yet.
        """
        return make_spec(self.model, self.workload, read_lanes(self.lanes), self.options, self.settings, self.device)

    def spec_or_none(self) -> ExperimentSpec | None:
        """The experiment, or None while what stands on the page is not one."""
        try:
            return self.spec()
        except SpecError:
            return None

    def lane_names(self) -> list[str]:
        """What the lanes that would run are called, baseline first."""
        own = [p.get("name") or f"Lane {chr(65 + i)}" for i, p in enumerate(self.lanes) if p.get("steps")]
        return ["Baseline", *own]


def show_model(ctx: Context, model: str) -> Data:
    """What is known of a model before the worker was asked."""
    info = ctx.models.known(model or "")
    if info is None:
        return facts([], "Looking up this model…" if model else "Choose a model.")
    return facts(pending_rows(info, ctx.estimate_errors()), info.note)


def workload_choices(catalog: Catalog, family: str) -> list[tuple[str, str]]:
    """(label, id) of all workloads; those that a family cannot run stand behind and say for which models they are."""
    fitting = [(w.title, w.id) for w in catalog.workloads if not family or family in w.families]
    others = [
        (f"{w.title} (for {', '.join(w.families)} models)", w.id)
        for w in catalog.workloads
        if family and family not in w.families
    ]
    return fitting + others


def usual_workload(catalog: Catalog, family: str) -> str:
    """The workload to begin with for a family: the one made for it alone, else the first that it can run."""
    able = [w for w in catalog.workloads if family in w.families]
    return min(able, key=lambda w: len(w.families)).id if able else catalog.workloads[0].id


def show_workload(card: WorkloadCard) -> Data:
    """What a workload does and which difference it can show."""
    return facts([("What", card.summary), ("Shows", card.detects)])


class StudioEvents:
    """The handlers.

    Args:
        ctx: what they work with.
    """

    def __init__(self, ctx: Context):
        self.ctx = ctx

    def choose_model(self, model: str, workload: str) -> tuple[Any, ...]:
        """A model was chosen: show at once what is known of it, and a workload that it can run."""
        return (show_model(self.ctx, model), *self.fit_workload(model, workload))

    def fit_workload(self, model: str, workload: str) -> tuple[Any, ...]:
        """The workloads, those of the model's family first.

        The usual one of the family is chosen where the model cannot run this one, or where that one is made for its
        family alone (a model that sees is asked about images, not about texts).
        """
        info = self.ctx.models.known(model or "")
        choices = workload_choices(self.ctx.catalog, info.family if info else "")
        card = self.ctx.catalog.workload_by_id.get(workload)
        if info is None or card is None:
            return gr.update(choices=choices), gr.skip(), gr.skip()
        new = usual_workload(self.ctx.catalog, info.family)
        made_for_it = len(self.ctx.catalog.workload_by_id[new].families) == 1 < len(card.families)
        if info.family in card.families and not made_for_it:
            return gr.update(choices=choices), gr.skip(), gr.skip()
        return (gr.update(choices=choices, value=new), *self.choose_workload(new))

    def look_up(self, *state: Any) -> Data:
        """Ask the worker what the model is and what the experiment would need."""
        on = OnPage(*state)
        refused = self._refused_model(on.model or "")
        if refused or not on.model:
            return facts([], sentences(SpecError(refused))[0] if refused else "Choose a model.", "warning")
        try:
            spec = on.spec_or_none()
            if spec is not None and refusals(self.ctx, spec):
                spec = None  # the worker does not hear of what is not allowed
            found = self.ctx.models.look_up(on.model, spec, on.device)
        except StudioError as e:
            info = self.ctx.models.known(on.model)
            return facts(model_rows(info) if info else [], sentences(e)[0], "warning")
        rows = [*model_rows(found.info), *memory_rows(found.estimate, self.ctx.estimate_errors())]
        return facts(rows, found.info.note, "info" if found.fits_baseline else "warning")

    def _refused_model(self, model: str) -> list[Problem]:
        if self.ctx.hosted:
            return self.ctx.hosted.model_problems(model.strip()) if model else []
        return [] if self.ctx.local_paths else path_problems(model, {}, "", self.ctx.catalog)

    def unload(self, device: str) -> Data:
        """Unload was pressed: let the worker drop its model, and say what came of it."""
        if self.ctx.hosted:
            return notice(sentence(READ_ONLY), "warning")
        try:
            return notice(sentence(self.ctx.dispatch.unload(device)))
        except StudioError as e:
            return notice(sentences(e)[0], "warning")

    def unloadable(self, device: str) -> Any:
        """Unloading is for a device that has nothing to do."""
        busy = any(s.running or s.queued for s in self.ctx.dispatch.status() if s.device == device)
        return gr.update(interactive=not busy)

    def choose_workload(self, workload: str) -> tuple[Data, Data]:
        """A workload was chosen: what it does, and its options at their defaults."""
        card = self.ctx.catalog.workload_by_id.get(workload)
        return (show_workload(card), form_value(card.options)) if card else (facts([], "Choose a workload."), form_value({}))

    def describe_workload(self, workload: str) -> Data:
        """What the workload does, without touching its options."""
        return self.choose_workload(workload)[0]

    def setup(self, *state: Any) -> Any:
        """What the editor checks its lanes against; it checks anew when the worker has said what the model is."""
        on = OnPage(*[*state, []])
        known = self.ctx.models.known(on.model or "")
        setup = {k: v for k, v in on._asdict().items() if k != "lanes"}
        return gr.update(setup={**setup, "inspected": known is not None and known.inspected})

    def estimate(self, *state: Any) -> Data:
        """How long it will take."""
        spec = OnPage(*state).spec_or_none()
        return facts([], estimate_text(estimate_seconds(spec, self.ctx.races.finished(), self.ctx.catalog)) if spec else "")

    def edited(self, model: str, workload: str, settings: Data, event: gr.EventData) -> tuple[Any, ...]:
        """The editor asks for something outside its lanes: a setting that mends a problem, or the model of an example.

        Returns:
            Model, its facts, workload, its facts, its options, settings.
        """
        if event.field != "start":
            return (*[gr.skip()] * 5, form_value(settings_schema(), {**settings, str(event.field): event.value}))
        info = self.ctx.models.known(model or "")
        bound = event.value.get("bound") and model != event.value["model"]  # its policies need this very model
        if info is not None and info.family in event.value["families"] and not bound:
            return (gr.skip(),) * 6
        new, card = event.value["model"], self.ctx.catalog.workload_by_id.get(event.value["workload"])
        family = card.families[0] if card else ""
        start = event.value["workload"]
        listed = gr.update(choices=workload_choices(self.ctx.catalog, family), value=start)
        return (new, show_model(self.ctx, new), listed, *self.choose_workload(start), gr.skip())

    def press_run(self, *state_and_live: Any) -> tuple[Any, Any]:
        """Run was pressed: start the experiment and watch it, or say why not."""
        *state, live = state_and_live
        on = OnPage(*state)
        try:
            experiment = start(self.ctx, on.spec(), str(live.get("owner") or ""))
        except StudioError as e:
            return notice(sentences(e, on.lane_names()), "error"), gr.skip()
        return notice(), {**live, "watch": experiment, "at": time.time()}

    def make_link(self, *state: Any) -> Data:
        """The link to what stands on the page."""
        return {"packed": link_of(OnPage(*state)._asdict())}

    def restore(self, request: gr.Request) -> tuple[Any, ...]:
        """The page was opened: put in place what its link holds."""
        text = dict(request.query_params).get("p")
        untouched = [gr.skip()] * len(OnPage._fields)
        if not text:
            return (*untouched, notice())
        try:
            state = OnPage(**read_link(text, self.ctx))
        except StudioError as e:
            return (*untouched, notice(sentences(e), "error"))
        options = form_value(self.ctx.catalog.workload_by_id[state.workload].options, state.options)
        settings = form_value(settings_schema(), state.settings)
        return (state.model, state.workload, options, settings, state.device, {"lanes": state.lanes}, notice())
