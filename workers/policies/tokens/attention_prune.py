"""Dropping the image tokens that CLS attends to least."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.vision_attention import VisionCall, VisionForward, gather_tokens
from workers.mechanisms.vision_blocks import between_halves
from workers.methods import Policy, card, knob
from workers.session import Session


class AttentionPrune(Policy):
    """Drop the image tokens that CLS attends to least, in a few steps through the encoder.

    Liang et al. 2022 (EViT), arXiv:2202.07800, section 3: between attention and feed-forward of some layers the
    tokens with the least attention from CLS (mean over heads) leave. Deviations: no training with it, the dropped
    tokens are not fused into one, and the total share is set, which the steps reach by equal factors.
    """

    card: ClassVar[Card] = card(
        id="attention-prune",
        title="Attention pruning",
        paper="arXiv:2202.07800",
        stage="tokens",
        families=("vit",),
        traits=("cls-token", "vision-blocks"),
        owns=("tokens.visual",),
        effects={"visual_tokens": "down"},
        hopes={"images_per_s": "up"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.02, le=1.0, help="share of image tokens left after the last step; lower = faster, less accurate")
    steps: int = knob(
        3, ge=1, le=12, help="how many times tokens are dropped, evenly spread over the layers; more = gentler, slower"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Rank in every dropping layer, drop between its halves."""
        return ExitStack() if self.is_neutral else self._dropping(session)

    def plan(self, layers: int, patches: int) -> dict[int, int]:
        """Layer -> patches that are left behind it; the attention of the first layer always works on all."""
        steps = min(self.steps, max(1, layers - 1))
        at = [min(layers - 1, max(0, round((i + 1) * layers / (steps + 1)) - 1)) for i in range(steps)]
        return {layer: max(1, round(patches * self.keep ** ((i + 1) / steps))) for i, layer in enumerate(at)}

    @contextmanager
    def _dropping(self, session: Session) -> Iterator[None]:
        layers = len(session.family.parts(session.model)["vision_layers"])
        front = 2 if "distillation-token" in session.info.traits else 1
        dropping = self.plan(layers, 1)
        attended: dict[int, Tensor] = {}

        def watch(call: VisionCall) -> None:
            if call.layer in dropping:
                attended[call.layer] = call.cls_attention()[:, front - 1 :]  # [B, patches left]

        def drop(vision: VisionForward, layer: int, hidden: Tensor) -> Tensor:
            if layer not in dropping:
                return hidden
            patches = hidden.shape[1] - front if vision.source is None else vision.source.shape[1] - front
            left, scores = self.plan(layers, patches)[layer], attended.pop(layer)
            if left >= hidden.shape[1] - front:
                return hidden
            return self._drop(session, vision, hidden, scores, left, front, (layer + 1) / layers)

        with session.hooked(session.vision_observers, watch), between_halves(session, drop):
            yield

    def _drop(
        self, session: Session, vision: VisionForward, hidden: Tensor, scores: Tensor, left: int, front: int, depth: float
    ) -> Tensor:
        """Keep the ``left`` best patches of hidden [B, T, C], and note what became of the others."""
        b, t, _ = hidden.shape
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        best = order[:, :left].sort(-1).values + front
        stays = torch.cat([torch.arange(front, device=hidden.device).expand(b, -1), best], 1)
        if vision.source is None:
            vision.source = torch.arange(t, device=hidden.device).expand(b, -1)
            vision.layers_seen = torch.ones(b, t, device=hidden.device)
        new = torch.full((b, t), -1, dtype=torch.long, device=hidden.device)
        new.scatter_(1, stays, torch.arange(stays.shape[1], device=hidden.device).expand(b, -1))
        was = vision.source
        vision.source = torch.where(was >= 0, new.gather(1, was.clamp_min(0)), was)
        gone = (was >= 0) & (vision.source < 0)
        vision.layers_seen = torch.where(gone, depth, vision.layers_seen)  # type: ignore[arg-type]
        session.did(self.card.id, t - stays.shape[1])
        return gather_tokens(hidden, stays)
