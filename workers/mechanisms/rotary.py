"""Queries and keys as they were before their rotary embedding, and as they would be at other positions.

Attention hands over what is already turned by its position, and the cache holds it so. Turning by the opposite angle
takes it back, with the library's own module and function, so that scaled and layer-wise angles come out right.

Shapes: B batch, H heads, N vectors, D head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from studio_state.errors import Unavailable
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Kept, evicting
from workers.mechanisms.evictor import Evictor
from workers.models.info import LEAN_SHAPES
from workers.session import Session

TURNING = (*LEAN_SHAPES, "gemma3_text", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
"""Model types in which every layer turns whole queries and keys by ``apply_rotary_pos_emb``, as the last thing before attention."""


class Rotary:
    """The rotary embedding of a model; a copy, because some kinds remember the longest text they have seen.

    Args:
        backbone: the language model without its output head.

    Raises:
        Unavailable: it is of a type whose rotary embedding is not known here.
    """

    def __init__(self, backbone: Any, name: str):
        kind = backbone.config.model_type
        if kind not in TURNING:
            raise Unavailable(
                f"{name} is of type {kind}, whose rotary embedding cannot be taken back here; "
                f"known: {', '.join(TURNING)}; choose such a model, or another policy"
            )
        family = kind.removesuffix("_text")
        self._turn: Callable[..., tuple[Tensor, Tensor]] = import_module(
            f"transformers.models.{family}.modeling_{family}"
        ).apply_rotary_pos_emb
        self._angles: nn.Module = deepcopy(backbone.rotary_emb)
        layered = "layer_type" in inspect.signature(backbone.rotary_emb.forward).parameters
        self._kinds: list[str] = list(backbone.config.layer_types) if layered else []

    def undo(self, x: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Queries or keys [B, H, N, D] before rotary embedding: float32.

        Args:
            positions: [B or 1, 1 or H, N]; below 0 = padding, what comes out there means nothing.
        """
        cos, sin = self.angles(x, positions.clamp_min(0), layer)
        size = cos.square() + sin.square()  # not 1 where a model scales its angles (YaRN)
        return self._turned(x, cos / size, -sin / size)

    def ahead(self, x: Tensor, last: Tensor, count: int, layer: int) -> Tensor:
        """The mean of vectors [B, H, N, D] over the next ``count`` positions behind ``last`` [B]: float32.

        Rotary embedding is linear in its cosines and sines, so their means turn by the mean of all rotations.
        """
        positions = last[:, None, None] + torch.arange(1, count + 1, device=last.device)
        cos, sin = (a.mean(2, keepdim=True) for a in self.angles(x, positions, layer))
        return self._turned(x, cos, sin)

    def angles(self, x: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, 1 or H, N, D] (float32, on the device of ``x``) at these positions."""
        more = {"layer_type": self._kinds[layer]} if self._kinds else {}
        like = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = self._angles(like, position_ids=positions.flatten(0, 1), **more)
        return cos.unflatten(0, positions.shape[:2]), sin.unflatten(0, positions.shape[:2])

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()[None]
        return self._turn(x, x, cos, sin, unsqueeze_dim=0)[0][0]


class UnturnedEvictor(Evictor):
    """Scores positions by queries or keys as they were before rotary embedding.

    For language models: where images are among the words, positions may run in three directions, which caches do not keep.
    """

    def unturned_scores(self, rotary: Rotary, call: AttentionCall) -> Tensor:
        """How much each stored entry of one layer is worth [B, H, S], higher = keep."""
        raise NotImplementedError

    def choose_by(self, rotary: Rotary, call: AttentionCall) -> Kept | None:
        """The best by score, within the budget."""
        return self.best(call, self.unturned_scores(rotary, call))

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with self._evicting_by(session, Rotary(session.family.backbone(session.model), session.info.name)):
            yield

    @contextmanager
    def _evicting_by(self, session: Session, rotary: Rotary) -> Iterator[None]:
        choose = partial(self.choose_by, rotary)
        with evicting(session, self.card.id, choose, self.when, self.every, self.between_chunks):
            yield
