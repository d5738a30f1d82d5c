"""The studio page: choose a model, compose lanes by drag, press Run, watch the race."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.components.facts import Facts, LinkBox, Notice
from app.components.knob_form import SchemaForm
from app.components.live_race import LiveRace
from app.components.pipeline_editor import PipelineEditor
from app.compose import settings_schema
from app.context import Context
from app.models import choices
from app.views.studio_calls import editor_calls, live_calls
from app.views.studio_events import StudioEvents, show_model, show_workload, usual_workload, workload_choices
from studio_state import zoo
from studio_state.catalog import WorkloadCard, asset

TITLE = "Studio"
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
DIRECT: dict[str, Any] = {**PRIVATE, "queue": False}
FIRST_WORKLOADS = ("prompts", "needle", "speed")


@dataclass
class StudioPage:
    """The components that events use."""

    model: gr.Dropdown
    model_facts: Facts
    unload: gr.Button
    unload_said: Notice
    workload: gr.Dropdown
    workload_facts: Facts
    options: SchemaForm
    device: gr.Dropdown
    settings: SchemaForm
    editor: PipelineEditor
    run: gr.Button
    link: gr.Button
    link_box: LinkBox
    estimate: Facts
    message: Notice
    live: LiveRace

    @property
    def setup(self) -> list[Any]:
        """What an experiment is made of besides its lanes."""
        return [self.model, self.workload, self.options, self.settings, self.device]

    @property
    def everything(self) -> list[Any]:
        """What an experiment is made of."""
        return [*self.setup, self.editor]


def build(ctx: Context) -> None:
    """Lay out the page inside the current Blocks and wire it."""
    page, events = layout(ctx), StudioEvents(ctx)
    wire_setup(page, events)
    wire_run(page, events)
    wire_link(page, events)


def examples() -> list[dict[str, Any]]:
    """The packaged example pipelines, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(asset("pipelines").glob("*.json"))]


def opening(ctx: Context) -> tuple[str, WorkloadCard]:
    """The model and the workload that the page opens with.

    In a hosted studio it is a model that is there already, so that a mere visit fetches nothing.
    """
    cards = ctx.catalog.workload_by_id
    first = next((cards[i] for i in FIRST_WORKLOADS if i in cards), ctx.catalog.workloads[0])
    model = next((e for e in zoo.entries() if ctx.hosted is None or zoo.is_cached(e)), None)
    if model is None or ctx.hosted is None or model.family == "llm":
        return model.id if model else "", first
    return model.id, cards[usual_workload(ctx.catalog, model.family)]


def layout(ctx: Context) -> StudioPage:
    """All components, top to bottom."""
    (chosen, first), models = opening(ctx), choices()
    model_info = "One of the list, a Hub id org/name" + (", or a folder or GGUF file here" if ctx.local_paths else "")
    parts: dict[str, Any] = {}
    with gr.Row(elem_classes="ps-setup"):
        with gr.Column(scale=4, min_width=280):
            parts["model"] = gr.Dropdown(
                models, value=chosen or None, label="Model", info=model_info, allow_custom_value=True, elem_id="model"
            )
            parts["model_facts"] = Facts(show_model(ctx, chosen), elem_id="model-facts")
            with gr.Row(elem_classes="ps-unload"):
                parts["unload"] = gr.Button("Unload model", size="sm", elem_id="unload", scale=0, min_width=110)
                parts["unload_said"] = Notice(elem_id="unload-said", scale=1)
        with gr.Column(scale=4, min_width=280):
            info = ctx.models.known(chosen)
            workloads = workload_choices(ctx.catalog, info.family if info else "")
            parts["workload"] = gr.Dropdown(
                workloads, value=first.id, label="Workload", info="What every lane runs", elem_id="workload"
            )
            parts["workload_facts"] = Facts(show_workload(first), elem_id="workload-facts")
            with gr.Accordion("Workload options", open=False):
                parts["options"] = SchemaForm(first.options, name="Workload options", elem_id="workload-options")
        with gr.Column(scale=3, min_width=240):
            devices = list(ctx.devices)
            parts["device"] = gr.Dropdown(devices, value=devices[0], label="Device", info="Where the lanes run", elem_id="device")
            with gr.Accordion("Measurement settings", open=False):
                parts["settings"] = SchemaForm(settings_schema(), name="Measurement settings", elem_id="settings")
    parts["editor"] = PipelineEditor(
        catalog=ctx.catalog, examples=examples(), setup={"workload": first.id}, elem_id="editor", **editor_calls(ctx)
    )
    with gr.Row(elem_classes="ps-run"):
        parts["run"] = gr.Button("Run", variant="primary", elem_id="run", scale=0, min_width=140)
        parts["estimate"] = Facts(elem_id="estimate", scale=1)
        parts["link"] = gr.Button("Copy link", size="sm", elem_id="copy-link", scale=0, min_width=110)
    parts["link_box"] = LinkBox(elem_id="link-box")
    parts["message"] = Notice(elem_id="message")
    parts["live"] = LiveRace(elem_id="race", **live_calls(ctx))
    return StudioPage(**parts)


def wire_setup(page: StudioPage, events: StudioEvents) -> None:
    """Model, workload and settings: show what they are, and let the editor check against them."""
    tell_editor: tuple[Any, ...] = (events.setup, page.setup, page.editor)
    estimate: tuple[Any, ...] = (events.estimate, page.everything, page.estimate)
    work = [page.workload, page.workload_facts, page.options]
    page.model.input(events.choose_model, [page.model, page.workload], [page.model_facts, *work], **DIRECT).then(
        events.look_up, page.everything, page.model_facts, concurrency_limit=2, **PRIVATE
    ).then(events.fit_workload, [page.model, page.workload], work, **DIRECT).then(*tell_editor, **DIRECT).then(
        *estimate, **DIRECT
    )
    page.unload.click(events.unload, page.device, page.unload_said, **PRIVATE).then(
        events.look_up, page.everything, page.model_facts, concurrency_limit=2, **PRIVATE
    )
    for moment in (page.live.tick, page.live.stop, page.device.input):
        moment(events.unloadable, page.device, page.unload, **DIRECT)
    page.workload.input(events.choose_workload, page.workload, [page.workload_facts, page.options], **DIRECT).then(
        *tell_editor, **DIRECT
    ).then(*estimate, **DIRECT)
    for changed in (page.options.input, page.settings.input, page.device.input):
        changed(*tell_editor, **DIRECT).then(*estimate, **DIRECT)
    begun = [page.model, page.model_facts, *work, page.settings]
    page.editor.edit(events.edited, [page.model, page.workload, page.settings], begun, **DIRECT).then(
        *tell_editor, **DIRECT
    ).then(events.describe_workload, page.workload, page.workload_facts, **DIRECT).then(
        events.look_up, page.everything, page.model_facts, concurrency_limit=2, **PRIVATE
    ).then(*tell_editor, **DIRECT)
    page.editor.change(*estimate, trigger_mode="always_last", **DIRECT)
    page.live.stop(*estimate, **DIRECT)


def wire_run(page: StudioPage, events: StudioEvents) -> None:
    """Run. (Cancel belongs to the live view.)"""
    page.run.click(events.press_run, [*page.everything, page.live], [page.message, page.live], **DIRECT)


def wire_link(page: StudioPage, events: StudioEvents) -> None:
    """The shareable link: made on request, read when the page opens."""
    page.link.click(events.make_link, page.everything, page.link_box, **DIRECT)
    blocks = gr.context.Context.root_block
    if blocks is None:
        raise RuntimeError("the studio page is built inside gr.Blocks")
    tell_editor: tuple[Any, ...] = (events.setup, page.setup, page.editor)
    blocks.load(events.restore, None, [*page.everything, page.message], **DIRECT).then(*tell_editor, **DIRECT).then(
        events.describe_workload, page.workload, page.workload_facts, **DIRECT
    ).then(events.look_up, page.everything, page.model_facts, concurrency_limit=2, **PRIVATE).then(*tell_editor, **DIRECT)
