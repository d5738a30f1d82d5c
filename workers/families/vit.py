"""Vision transformers: one pass an image. What comes out is a class, or features where the model names none.

Shapes: B images, T tokens (CLS first, where there is one), P patches, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from studio_state.errors import WorkloadError
from workers.data.pictures import as_png, shown
from workers.families.base import RunTrace, SeenImage, StepResult
from workers.families.comparing import distance, similarity
from workers.families.image_layout import image_layout
from workers.families.parts import vision_parts
from workers.mechanisms.vision_attention import VisionForward, gather_tokens, seeing
from workers.mechanisms.visual_tokens import ImageRecord, seed_of
from workers.session import Session
from workers.workloads.base import Item, ItemResult

BEST = 5  # classes that are told of


class VisionFamily:
    """Adapter for the library's ViT, DeiT, DINOv2 and CLIP encoders."""

    id = "vit"

    def backbone(self, model: Any) -> Any:
        """The encoder without the classifier."""
        return model.get_submodule(model.base_model_prefix) if hasattr(model, model.base_model_prefix) else model

    def parts(self, model: nn.Module) -> dict[str, list[str]]:
        """Layers, attentions and linear maps of the encoder; the classifier is the head."""
        seen = vision_parts(model, self.backbone(model))
        heads = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in seen["vision_linears"]]
        return {
            **seen,
            "layers": seen["vision_layers"],
            "attentions": seen["vision_attentions"],
            "linears": [n for n in seen["vision_linears"] if n not in heads],
            "head": heads[:1],
        }

    def warm_up_item(self, session: Session, like: Item) -> Item:
        """The first item itself."""
        return like

    def probe(self, session: Session, item: Item) -> RunTrace:
        """Its outcome."""
        trace = self.begin(session, [item])
        for _ in self.run(session, trace):
            pass
        return trace

    def begin(self, session: Session, items: Sequence[Item]) -> RunTrace:
        """Open and prepare the images; nothing runs yet.

        Raises:
            WorkloadError: an item has no image, or it cannot be opened.
        """
        trace = RunTrace(items=items, results=[ItemResult(item=i) for i in items])
        for item in items:
            if item.image is None:
                raise WorkloadError(f"item {item.id} has no image, but {session.info.name} sees nothing else; give it one")
            picture = item.image.open()
            inputs = dict(session.images(images=[picture], return_tensors="pt"))
            layout = image_layout(session.model, inputs, picture.width, picture.height, session.images)
            trace.images.append(SeenImage(inputs, layout, shown(picture), seed_of(session.spec.seed, item.id)))
            trace.prompts.append("")
            trace.pieces.append([])
        return trace

    @torch.inference_mode()
    def run(self, session: Session, trace: RunTrace) -> Iterator[StepResult]:
        """One forward for the batch."""
        session.counts.clear()
        session.check_cancelled()
        images = [i for i in trace.images if i is not None]
        start = session.clock()
        pixels = torch.cat([i.inputs["pixel_values"] for i in images]).to(session.device, session.dtype)
        layers = {session.model.get_submodule(n): i for i, n in enumerate(self.parts(session.model)["attentions"])}
        with seeing(VisionForward(layers, session.vision_observers)) as forward:
            out = session.model(pixel_values=pixels)
        step = StepResult("step", session.clock() - start, [[] for _ in images], [""] * len(images))
        trace.steps.append(step)
        cells = len(images[0].layout.boxes)
        self._record(trace, forward, cells)
        trace.counts.update(session.counts)
        trace.counts["visual_tokens"] = sum(len(r.entered) for r in trace.seen) / len(images)
        self._outcome(session, trace, out, forward, cells)
        yield step

    def _record(self, trace: RunTrace, forward: VisionForward, cells: int) -> None:
        """What became of the patches of each image."""
        for row in range(len(trace.items)):
            record = ImageRecord(trace.images[row].layout if trace.images[row] else None, share=[1.0] * cells)  # type: ignore[union-attr]
            if forward.source is not None:
                extra = forward.source.shape[1] - cells  # CLS and the like stand before the patches
                source = forward.source[row, extra:].tolist()
                first = {token: patch for patch, token in reversed([*enumerate(source)]) if token >= 0}
                record.entered = sorted(first.values())  # of merged patches the first
                merged = len(record.entered) < sum(t >= 0 for t in source)
                record.group = source if merged else []
                if forward.layers_seen is not None:
                    record.share = forward.layers_seen[row, extra:].tolist()
            else:
                record.entered = list(range(cells))
            trace.seen.append(record)

    def _outcome(self, session: Session, trace: RunTrace, out: Any, forward: VisionForward, cells: int) -> None:
        """Classes and their probabilities, or the features; and the map of a saliency head."""
        logits = getattr(out, "logits", None)
        if logits is None:
            pooled = out.pooler_output if getattr(out, "pooler_output", None) is not None else out.last_hidden_state[:, 0]
            trace.features = list(pooled.float().cpu())
        else:
            trace.logits = list(logits.float().log_softmax(-1)[:, None].cpu())
            names = session.model.config.id2label
            for result, row in zip(trace.results, trace.logits, strict=True):
                best = row[0].exp().topk(min(BEST, row.shape[-1]))
                result.ranked = [(str(names[int(i)]), float(p)) for p, i in zip(*best, strict=True)]
                result.text = result.ranked[0][0]
        head = getattr(session.model, "saliency_head", None)
        if head is not None:
            tokens = out.last_hidden_state
            if forward.source is not None:  # a map needs every patch: merged ones share their token, dropped ones have none
                index = forward.source.clamp_min(0)
                tokens = gather_tokens(tokens, index).masked_fill((forward.source < 0)[..., None], 0.0)
            maps = head(tokens.float()).cpu()
            trace.features = [m.flatten() for m in maps]
            for result, m in zip(trace.results, maps, strict=True):
                result.data["image"] = as_png(m.numpy())

    def follow(self, session: Session, items: Sequence[Item], reference: RunTrace) -> RunTrace:
        """Its own outcome: nothing in one pass depends on what the reference did."""
        return self.probe(session, items[0])

    def compare(self, reference: RunTrace, lane: RunTrace) -> list[dict[str, float]]:
        """Distance of the classes' distributions, and of features or maps where the model gives those."""
        found: list[dict[str, float]] = [{} for _ in lane.items]
        for row, (a, b) in enumerate(zip(reference.logits, lane.logits, strict=True)):
            found[row] |= distance(a, b)
        for row, (a, b) in enumerate(zip(reference.features, lane.features, strict=True)):
            found[row]["feature_similarity"] = similarity(a, b)
        return found
