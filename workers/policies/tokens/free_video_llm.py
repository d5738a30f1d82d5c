"""Free Video-LLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.catalog import Card
from studio_state.errors import Unavailable
from workers.families.parts import TOWERS, child
from workers.mechanisms.clip_scorer import Scorer, load_scorer
from workers.mechanisms.frame_pooling import (
    Sides,
    averaged,
    averaged_groups,
    averaged_side,
    box_at,
    box_cells,
    box_size,
    evenly,
    widest,
    with_neighbours,
)
from workers.mechanisms.visual_tokens import CHOOSES_IMAGE_TOKENS, Selection, Visual, selecting
from workers.methods import Policy, card, knob
from workers.session import Session


class FreeVideoLLM(Policy):
    """Of a clip, show the frames that fit the question, a box of each, and all frames coarsely.

    Han et al. 2024, arXiv:2410.10441, section 3: three pathways one after the other. Slow: the frames whose CLIP
    embedding is nearest to the question's, in the order of time; middle: frames evenly spread; both cut to the box
    around the patches nearest to the question. Fast: every frame averaged to a few cells. Of a single image, and of each
    of its tiles, only the box is cut. Deviations: the box is a rectangle of the image (the released code reads the
    pooled grid of 24 x 12 as 12 x 24, so that its box is none); its corner is rounded half up; an odd last column is
    pooled alone; no rotary scaling for longer contexts. The scorer reads what the model's own tower saw, as in the paper,
    where the tower is CLIP's.
    """

    card: ClassVar[Card] = card(
        id="free-video-llm",
        title="Free Video-LLM",
        paper="arXiv:2410.10441",
        traits=("cls-token",),
        **CHOOSES_IMAGE_TOKENS | {"neutral": {"slow": 1000, "middle": 0, "fast": 0, "keep": 1.0, "pool": 1}},
    )
    slow: int = knob(2, ge=0, le=1000, help="frames chosen by the question (3 of 50 in the paper); more = slower, sees more")
    middle: int = knob(1, ge=0, le=1000, help="frames spread evenly (5 of 50 in the paper); more = slower, sees more")
    fast: int = knob(2, ge=0, le=64, help="cells an edge of every frame, averaged (4 of 24 in the paper); 0 = none")
    keep: float = knob(
        0.8, ge=0.01, le=1.0, help="share of a slow or middle frame, or of an image, in its box; lower = faster, sees less"
    )
    pool: int = knob(1, ge=1, le=8, help="columns of slow and middle frames pooled to one (2 in the paper); more = coarser")
    scorer: str = knob(
        "",
        max_length=4096,
        format="path",
        help="CLIP model whose vision tower the model has: zoo id, Hub id or folder; empty = the one that comes with the model",
    )

    def prepare(self, session: Session) -> None:
        """Load the scorer."""
        if not self.is_neutral:
            self._loaded(session)

    def _loaded(self, session: Session) -> Scorer:
        found: Scorer = session.once((Scorer, self.scorer), lambda: load_scorer(session, self.scorer))
        return found

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Note what the tower sees; choose when the images are encoded."""
        return nullcontext() if self.is_neutral else self._choosing(session)

    @contextmanager
    def _choosing(self, session: Session) -> Iterator[None]:
        scorer, noting = self._loaded(session), dict[str, Tensor]()

        def note(module: nn.Module, args: Any, seen: Any) -> None:
            noting.update(frames=seen.pooler_output, patches=seen.last_hidden_state[:, 1:])  # [P, D], [P, C, D]

        def choose(visual: Visual, keep: float) -> Selection:
            text = scorer.text(visual.asked)  # [E]
            frames = scorer.seen(visual.noted["frames"])  # [P, E]
            cells = scorer.seen(visual.noted["patches"]).unflatten(1, visual.side)  # [P, h, w, E]
            if visual.frames == 1:
                return self.of_image(visual, keep, F.normalize(cells, dim=-1) @ text)
            cells = F.normalize(widest(cells, self.pool), dim=-1)
            return self.of_clip(visual, keep, F.normalize(frames, dim=-1) @ text, cells @ text)

        tower: Any = child(session.model.model, TOWERS)
        with ExitStack() as stack:
            stack.callback(tower.register_forward_hook(note).remove)
            stack.enter_context(session.hooked(session.companions, scorer))
            stack.enter_context(selecting(session, self.card.id, self.keep, choose, noting))
            yield

    def of_image(self, visual: Visual, keep: float, scores: Tensor) -> Selection:
        """The box of every view, and all line breaks.

        Args:
            scores: [P, h, w] how well each patch of each view fits the question.
        """
        cells = box_cells(box_at(scores, keep), box_size(visual.side, keep), visual.side)  # [P, box]
        stays = torch.zeros(len(scores), visual.cells, dtype=torch.bool, device=scores.device).scatter_(1, cells, True)
        return Selection(visual.with_breaks((visual.placed & stays.flatten()[visual.rows.clamp_min(0)]).nonzero()[:, 0]))

    def of_clip(self, visual: Visual, keep: float, frames: Tensor, scores: Tensor) -> Selection:
        """The three pathways.

        Args:
            frames: [T] how well each frame fits the question; scores: [T, h, w'] and each cell, columns pooled.

        Raises:
            Unavailable: the model reads a frame in tiles.
        """
        total, cells, (h, w) = visual.frames, visual.cells, visual.side
        if len(visual.rows) != total * cells:
            raise Unavailable("a clip needs a model that reads each frame as one view without tiles, as LLaVA does")
        whole = visual.features.view(total, h, w, -1)
        place = torch.arange(total * cells, device=frames.device).view(total, h, w)  # the token of each cell
        slow = frames.sort(descending=True, stable=True).indices[: self.slow].sort().values
        chosen = torch.cat([slow, evenly(self.middle, total).to(slow.device)])
        box = box_cells(box_at(scores[chosen], keep), box_size(scores.shape[1:], keep), scores.shape[1:])  # [n, box]
        index = [place[chosen][:, :, :: self.pool].flatten(1).gather(1, box).flatten()]
        features = [widest(whole[chosen], self.pool).flatten(1, 2)[torch.arange(len(chosen))[:, None], box].flatten(0, 1)]
        group = torch.full_like(place, -1)
        if self.fast:
            anchors, group = averaged_groups(place, self.fast)
            index.append(anchors.flatten())
            features.append(averaged(whole, self.fast).flatten(0, 2))
        if self.fast or self.pool > 1:
            return Selection(torch.cat(index), torch.cat(features), with_neighbours(group, index[0], self.pool))
        return Selection(index[0])

    def tokens(self, frames: int, side: Sides) -> int:
        """Image tokens that enter of a clip of so many frames, each of ``side`` cells."""
        box = box_size((side[0], -(-side[1] // self.pool)), self.keep)
        return (min(self.slow, frames) + min(self.middle, frames)) * prod(box) + frames * prod(averaged_side(side, self.fast))
