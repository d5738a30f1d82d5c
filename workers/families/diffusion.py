"""Diffusion pipelines: a picture for each item, drawn from its seed in denoising steps.

The library's own pipeline runs; what it hands to its scheduler after every step tells where it stands.

Shapes: B pictures of one batch, C channels, H x W pixels; inside the pipeline latents [B, c, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from studio_state.errors import WorkloadError
from workers.data.pictures import as_png
from workers.families.base import RunTrace, StepResult
from workers.families.comparing import similarity
from workers.mechanisms.denoising import Denoising
from workers.mechanisms.stepwise import stepwise
from workers.models.picture_judge import judge_of
from workers.session import Session
from workers.workloads.base import Item, ItemResult

PREVIEWS = 8  # pictures on the way that are shown of one run
MOST_PREVIEWED = 4  # rows of a batch that are shown on the way
BEST = 5  # classes that are told of
BINNED = (32, 64, 128)  # latent edges
ENCODE, STEP, DECODE = "encode", "step", "decode"


class DiffusionFamily:
    """Adapter for the library's text-to-image and class-conditional pipelines."""

    id = "diffusion"

    def backbone(self, model: Any) -> Any:
        """The denoiser."""
        return model.denoiser

    def parts(self, model: Any) -> dict[str, list[str]]:
        """Blocks, attentions, linear maps and convolutions of the denoiser."""
        names = {id(m): n for n, m in model.named_modules()}
        inside = list(model.denoiser.modules())
        lists = [m for n, m in model.denoiser.named_children() if isinstance(m, nn.ModuleList) and n.endswith("blocks")]
        return {
            "layers": [names[id(block)] for blocks in lists for block in blocks],
            "attentions": [names[id(m)] for m in inside if hasattr(m, "to_q") and hasattr(m, "to_k")],
            "linears": [names[id(m)] for m in inside if isinstance(m, nn.Linear)],
            "convolutions": [names[id(m)] for m in inside if isinstance(m, nn.Conv2d) and m.groups == 1],
        }

    def warm_up_item(self, session: Session, like: Item) -> Item:
        """The first item itself."""
        return like

    def probe(self, session: Session, item: Item) -> RunTrace:
        """Its picture."""
        trace = self.begin(session, [item])
        for _ in self.run(session, trace):
            pass
        return trace

    def begin(self, session: Session, items: Sequence[Item]) -> RunTrace:
        """What is drawn; nothing runs yet.

        Raises:
            WorkloadError: items of one batch ask for other numbers of steps, guidance or sizes.
        """
        if any(i.data.get(k) != items[0].data.get(k) for i in items for k in ("steps", "guidance", "size")):
            raise WorkloadError("pictures of one batch need the same steps, guidance and size; run them one by one (batch = 1)")
        trace = RunTrace(items=items, results=[ItemResult(item=i) for i in items])
        trace.prompts = [i.prompt for i in items]
        trace.pieces = [[] for _ in items]
        return trace

    def run(self, session: Session, trace: RunTrace) -> Iterator[StepResult]:
        """Draw the batch: encode, then one step a denoising step, then decode."""
        session.counts.clear()
        steps: Generator[StepResult, None, None] = stepwise(lambda hand: self._draw(session, trace, hand))
        try:
            while True:
                with torch.inference_mode():  # entered and left at every step: the caller's code between them is not in it
                    step = next(steps, None)
                if step is None:
                    break
                trace.steps.append(step)
                yield step
        finally:
            with torch.inference_mode():  # a pipeline that is left ends here, and restores the mode that it found
                steps.close()
        trace.counts.update(session.counts)

    def _draw(self, session: Session, trace: RunTrace, hand: Callable[[StepResult], None]) -> None:
        """Run the pipeline, handing over a timed step whenever its scheduler has made one."""
        session.check_cancelled()
        model: Any = session.model
        pipeline = model.pipeline
        rows = len(trace.items)
        start = session.clock()

        def first_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal start
            if session.denoising is None:
                taken = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
                session.denoising = Denoising(
                    of=len(pipeline.scheduler.timesteps),
                    guided=taken is not None and len(taken) == 2 * rows,
                    conditional_first=model.conditional_first,
                )
                now = session.clock()
                hand(StepResult(ENCODE, now - start))
                start = session.clock()
            session.count("denoiser_calls", 1.0)

        def stepped(out: Any, sample: Tensor) -> None:
            nonlocal start
            state, now = session.denoising, session.clock()
            if state is None:
                raise RuntimeError("the scheduler stepped before the denoiser ran")
            shown = preview(model, out, rows) if wanted(state.step, state.of) else []
            hand(StepResult(STEP, now - start, pictures=shown, place=(state.step + 1, state.of)))
            session.check_cancelled()
            state.step += 1
            start = session.clock()

        with (
            session.having(denoising=None),
            told_steps(pipeline.scheduler, stepped),
            pipeline_hook(model.denoiser, first_call),
        ):
            images = pipeline(**self._arguments(session, trace)).images
            hand(StepResult(DECODE, session.clock() - start))
            state = session.denoising
        self._outcome(trace, as_pictures(images), state, judge_of(model.labels))

    def _arguments(self, session: Session, trace: RunTrace) -> dict[str, Any]:
        """What the pipeline is called with."""
        model: Any = session.model
        asked = trace.items[0].data
        steps = max(1, round(asked["steps"] * session.step_share))
        seeds = [int(i.data["seed"]) for i in trace.items]
        out: dict[str, Any] = {
            "num_inference_steps": steps,
            "generator": [torch.Generator(session.device.type).manual_seed(seed) for seed in seeds],
            "output_type": "pt",
        }
        if model.accepts("class_labels"):
            out["class_labels"] = [int(i.data["label"]) for i in trace.items]
        else:
            out["prompt"] = [i.prompt for i in trace.items]
        if asked.get("guidance") is not None:
            out["guidance_scale"] = float(asked["guidance"])
        if asked.get("size") and model.accepts("height"):
            out |= {"height": asked["size"], "width": asked["size"]}
        if model.accepts("use_resolution_binning"):  # PixArt's table of shapes knows these sizes only
            out["use_resolution_binning"] = model.denoiser.config.sample_size in BINNED
        return out

    def _outcome(self, trace: RunTrace, images: list[Tensor], state: Denoising | None, judge: Any) -> None:
        """The pictures, what a judge sees in them, and how much of each step was taken from an earlier one."""
        trace.drawn = images
        if judge is not None:
            chances, features = judge.look(images)
            trace.features = list(features)
            for result, row in zip(trace.results, chances, strict=True):
                best = row.topk(min(BEST, len(row)))
                result.ranked = [(judge.model.config.id2label[int(i)], float(p)) for p, i in zip(*best, strict=True)]
                result.text = result.ranked[0][0]
        reused = state.reused if state else []
        trace.counts["denoising_steps"] = float(state.of if state else 0)
        trace.counts["guided_steps"] = float(state.of if state and state.guided else 0)
        for result, image in zip(trace.results, images, strict=True):
            result.drawn = image
            result.data["image"] = as_png(image.permute(1, 2, 0).squeeze(-1).numpy())
            if any(reused):
                result.data["reused"] = [round(share, 3) for share in reused]

    def follow(self, session: Session, items: Sequence[Item], reference: RunTrace) -> RunTrace:
        """Its own pictures: both lanes start from the same noise."""
        return self.probe(session, items[0])

    def compare(self, reference: RunTrace, lane: RunTrace) -> list[dict[str, float]]:
        """How far each picture is from the reference's of the same seed."""
        found = [distances(a, b) for a, b in zip(reference.drawn, lane.drawn, strict=True)]
        for values, a, b in zip(found, reference.features, lane.features, strict=False):
            values["feature_similarity"] = similarity(a, b)
        return found


@contextmanager
def told_steps(scheduler: Any, stepped: Callable[[Any, Tensor], None]) -> Iterator[None]:
    """Hear of every step of a scheduler: (what it gives back, the sample before).

    The wrapped method keeps its signature, which pipelines read to know what a scheduler takes.
    """
    original = scheduler.step

    @wraps(original)
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = original(model_output, timestep, sample, *args, **kwargs)
        stepped(out, sample)
        return out

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step  # the class's own shows again


@contextmanager
def pipeline_hook(denoiser: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    """Hear of every call of the denoiser, before it runs."""
    handle = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def wanted(step: int, of: int) -> bool:
    """Whether this step is shown: about eight of a run, not the last, which is the picture itself."""
    every = max(1, of // PREVIEWS)
    return step % every == every - 1 and step < of - 1


def preview(model: Any, out: Any, rows: int) -> list[str]:
    """What the first pictures look like on the way, as base64 PNGs; nothing for latents that are no images.

    The studio's own pipeline decodes them, as its VAEs are small. Of the library's pipelines that would cost as much as
    a step: the first channels of their latents stand for it.
    """
    sample = getattr(out, "pred_original_sample", None)
    sample = out.prev_sample if sample is None and hasattr(out, "prev_sample") else sample
    sample = out[0] if sample is None else sample
    if not isinstance(sample, Tensor) or sample.ndim != 4:
        return []
    few, decode = sample[: min(rows, MOST_PREVIEWED)], getattr(model.pipeline, "pictures", None)
    if decode is not None:
        shown: Tensor = decode(few)
    else:
        few = few.float()
        if getattr(model.pipeline, "vae", None) is not None:
            few = few[:, :3] if few.shape[1] >= 3 else few[:, :1]
            few = few / few.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
        shown = (few / 2 + 0.5).clamp(0, 1)
    return [as_png(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in shown.float().cpu()]


def as_pictures(images: Any) -> list[Tensor]:
    """A pipeline's images as [C, H, W] float32 from 0 to 1 on the CPU, whichever format it gave."""
    if not isinstance(images, Tensor):  # [B, H, W, C] numbers
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
    return list(images.float().cpu().clamp(0, 1))


def distances(reference: Tensor, picture: Tensor) -> dict[str, float]:
    """PSNR in decibels (none where the pictures are equal) and SSIM of two pictures [C, H, W] from 0 to 1."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = reference[None], picture[None]
    likeness = structural_similarity_index_measure(b, a, data_range=1.0)
    found = {"ssim": float(likeness), "same_output": float(torch.equal(a, b))}
    if not torch.equal(a, b):
        found["psnr"] = float(peak_signal_noise_ratio(b, a, data_range=1.0))
    return found
