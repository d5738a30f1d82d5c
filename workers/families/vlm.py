"""Vision-language models: an image becomes tokens among those of the prompt; the rest is a language model.

Everything of the language family holds here: its loop, cache, policies. Added is the image: encoded by the
library's own vision encoder and projector, its tokens offered to the selectors, and what they drop leaves
the prompt together with its placeholder, so that positions are counted anew.

Shapes: B batch, L padded prompt length, n image tokens of one image, D hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from studio_state.errors import WorkloadError
from workers.data.pictures import opened, shown
from workers.families.base import RunTrace, SeenImage, StepResult
from workers.families.batches import Batch, make_batch
from workers.families.image_layout import clip_layout, image_layout
from workers.families.llm import WARMUP_TOKENS, LanguageFamily
from workers.families.parts import DECODERS, PROJECTORS, TOWERS, child, language_parts, vision_parts
from workers.families.text import chat_text, encode_item
from workers.mechanisms.attention import Forward
from workers.mechanisms.vision_attention import VisionForward, seeing
from workers.mechanisms.visual_tokens import ImageRecord, Visual, seed_of, select
from workers.session import Session
from workers.workloads.base import Item

PICTURES = ("pixel_values", "image_sizes", "pixel_attention_mask", "image_grid_thw")  # what encoders of the library ask for


class VisionLanguageFamily(LanguageFamily):
    """Adapter for the library's image-text-to-text models: LLaVA, LLaVA-NeXT, SmolVLM, Idefics3, Qwen2.5-VL."""

    id = "vlm"

    def backbone(self, model: Any) -> Any:
        """The language model without its output head."""
        return child(model.model, DECODERS)

    def parts(self, model: Any) -> dict[str, list[str]]:
        """The language model's layers, the encoder's under ``vision_...``, and the linear maps of both."""
        tower, projector = child(model.model, TOWERS), child(model.model, PROJECTORS)
        parts = language_parts(model, self.backbone(model))
        if tower is None:
            return parts
        seen = vision_parts(model, tower)
        names = {id(m): n for n, m in model.named_modules()}
        between = [n for n, m in model.named_modules() if projector and isinstance(m, nn.Linear) and inside(m, projector)]
        return {
            **parts,
            **seen,
            "projector": [names[id(projector)]] if projector else [],
            "linears": [*seen["vision_linears"], *between, *parts["linears"]],
        }

    # -- before a run ----------------------------------------------------------------------
    def warm_up_item(self, session: Session, like: Item) -> Item:
        """The first item itself, cut to a few tokens: the encoder must be warm too."""
        return Item(
            id="warmup",
            prompt=like.prompt,
            prompt_ids=like.prompt_ids,
            chat=like.chat,
            image=like.image,
            max_new_tokens=WARMUP_TOKENS[1],
            ignore_eos=True,
        )

    def encode(self, session: Session, item: Item) -> tuple[str, list[int], SeenImage | None]:
        """The prompt with a placeholder for every image token, and the image; of a clip, all its frames before the words.

        Raises:
            WorkloadError: the image cannot be opened, or the prompt is empty.
        """
        if item.image is None:
            return *encode_item(session, item), None
        mark = session.images.image_token
        if mark in item.prompt:
            raise WorkloadError(
                f"item {item.id}: the prompt holds the image placeholder {mark}; leave it out, it is put in by the studio"
            )
        picture, frames = opened(item.image)
        text = chat_text(session, item, len(frames))
        found = session.images(images=[frames], text=[text], return_tensors="pt", add_special_tokens=not item.chat)
        ids = found["input_ids"][0].tolist()
        inputs = {k: v for k, v in found.items() if k not in ("input_ids", "attention_mask")}
        look = session.images.image_processor
        one = inputs if len(frames) == 1 else look(images=frames[:1], return_tensors="pt")
        layout = clip_layout(image_layout(session.model, one, *frames[0].size, look), len(frames))
        return text, ids, SeenImage(inputs, layout, shown(picture), seed_of(session.spec.seed, item.id), item.prompt)

    def images_of(self, session: Session, items: Sequence[Item]) -> Sequence[SeenImage | None]:
        """Prepared anew, so that nobody has to keep the pixels of a whole workload."""
        return [self.encode(session, item)[2] for item in items]

    # -- the image among the words ---------------------------------------------------------
    def embedded(self, session: Session, batch: Batch) -> Batch:
        """Encode the images, let the selectors choose, and build the prompts that are left."""
        session.seen = []
        turns = hasattr(session.model.model, "get_rope_index")
        if not any(batch.images) and not turns:
            return batch
        rows = [self._row(session, batch, row) for row in range(len(batch.lengths))]
        pad = session.processor.pad_token_id or 0
        new = make_batch([ids.tolist() for ids, _, _ in rows], pad, batch.ids.device)
        new.embeds = session.model.get_input_embeddings()(new.ids)
        new.image_tokens = torch.zeros_like(new.ids, dtype=torch.bool)
        length = new.ids.shape[1]
        for row, (ids, origin, features) in enumerate(rows):
            new.origin.append(origin.tolist())
            if features is None:
                continue
            places = (ids == image_token(session.model)).nonzero()[:, 0] + length - len(ids)
            new.embeds[row, places] = features.to(new.embeds.dtype)
            new.image_tokens[row, places] = True
        if turns:
            self._turn(session, batch, new)
        return new

    def _row(self, session: Session, batch: Batch, row: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One prompt after the selectors: ids, their places in the prompt that was given, features of its image tokens."""
        given = batch.ids[row, batch.ids.shape[1] - batch.lengths[row] :]
        everything = torch.arange(len(given), device=given.device)
        image: SeenImage | None = batch.images[row] if row < len(batch.images) else None
        if image is None:
            session.seen.append(ImageRecord())
            return given, everything, None
        record = ImageRecord(image.layout, share=[0.0] * len(image.layout.boxes))
        session.seen.append(record)
        start = session.clock()
        features = self.see(session, image)
        layout = image.layout
        rows = torch.tensor(layout.rows, device=features.device)
        views = torch.tensor(layout.views, device=features.device)
        visual = Visual(features, rows, views, layout.side, layout.tiles, image.seed, layout.frames, image.asked)
        kept, features = select(session, visual, record)
        session.count("encode_s", session.clock() - start)
        session.count("visual_tokens", len(kept) / len(batch.lengths))
        record.entered = kept.tolist()
        for token in record.entered:
            record.share[token] = 1.0
        chosen = in_place(given == image_token(session.model), kept.to(given.device))
        return given[chosen], chosen, features

    def see(self, session: Session, image: SeenImage) -> Tensor:
        """The image tokens [n, D] as the language model would read them all."""
        inputs = {
            k: v.to(session.device, session.dtype if v.is_floating_point() else v.dtype)
            for k, v in image.inputs.items()
            if k in PICTURES
        }
        parts = self.parts(session.model)
        layers = {session.model.get_submodule(n): i for i, n in enumerate(parts.get("vision_attentions", []))}
        with seeing(VisionForward(layers, session.vision_observers)):
            out = session.model.model.get_image_features(**inputs, return_dict=True)
        return torch.cat([features.reshape(-1, features.shape[-1]) for features in out.pooler_output])

    def _turn(self, session: Session, given: Batch, new: Batch) -> None:
        """Positions in three directions for the rotary embeddings of Qwen's models; kept tokens have those they had."""
        rows, shifts = [], []
        length = new.ids.shape[1]
        for row, origin in enumerate(new.origin):
            ids = given.ids[row, given.ids.shape[1] - given.lengths[row] :][None]
            image = given.images[row] if row < len(given.images) else None
            positions = torch.arange(ids.shape[1], device=ids.device).expand(3, 1, -1)
            if image is not None:
                kinds = (ids == image_token(session.model)).int()
                grid = image.inputs["image_grid_thw"].to(ids.device)
                positions, _ = session.model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
            kept = positions[:, 0, origin]  # [3, tokens]
            rows.append(nn.functional.pad(kept, (length - len(origin), 0)))
            shifts.append(int(positions.max()) + 1 - len(origin))
        new.rotary = torch.stack(rows, 1)
        new.rotary_shift = torch.tensor(shifts, device=new.ids.device)[:, None]

    def settle(self, session: Session, forward: Forward) -> None:
        """Note how many layers each image token went through, where a policy let only some of them go on."""
        layers = len(forward.cache.layers)
        for row, record in enumerate(session.seen if forward.narrowed else ()):
            places = dict(zip(record.entered, self._columns(forward, row, record), strict=True))  # token -> column
            for first, index in forward.narrowed:
                going = {column: place for place, column in enumerate(index[row].tolist())}
                for token in [t for t, column in places.items() if column not in going]:
                    record.share[token] = min(record.share[token], first / layers)
                    del places[token]
                places = {token: going[column] for token, column in places.items()}

    def _columns(self, forward: Forward, row: int, record: ImageRecord) -> list[int]:
        """Where the image tokens that entered stand among the new tokens of a row."""
        if forward.image_tokens is None or not record.entered:
            return []
        found: list[int] = forward.image_tokens[row].nonzero()[:, 0].tolist()
        return found

    @torch.inference_mode()
    def run(self, session: Session, trace: RunTrace) -> Iterator[StepResult]:
        """As a language model; what became of the image tokens is kept with the trace."""
        try:
            yield from super().run(session, trace)
            trace.seen = session.seen
        finally:
            session.seen = []

    def follow(self, session: Session, items: Sequence[Item], reference: RunTrace) -> RunTrace:
        """As a language model; what became of the image tokens is known from the run."""
        try:
            return super().follow(session, items, reference)
        finally:
            session.seen = []


def image_token(model: Any) -> int:
    """Id of the placeholder of one image token."""
    return int(model.config.image_token_id)


def in_place(is_image: Tensor, kept: Tensor) -> Tensor:
    """Which places of a prompt [L] are read, in their order, where only some image tokens enter.

    Tokens that enter out of their order, or more than once, stand where the first image token stood.

    Args:
        kept: [k] image tokens, counted among those of the prompt.
    """
    words, images = (~is_image).nonzero()[:, 0], is_image.nonzero()[:, 0]
    if bool((kept.diff() > 0).all()):
        return torch.cat([words, images[kept]]).sort().values
    return torch.cat([words[words < images[0]], images[kept], words[words > images[0]]])


def inside(module: nn.Module, other: nn.Module) -> bool:
    """True if ``module`` is ``other`` or a part of it."""
    return any(m is module for m in other.modules())
