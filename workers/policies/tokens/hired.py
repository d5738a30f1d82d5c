"""HiRED."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.vision_attention import VisionCall
from workers.mechanisms.vision_blocks import feature_layers
from workers.mechanisms.visual_tokens import CHOOSES_IMAGE_TOKENS, ChoosesImageTokens, Selection, Visual, selecting
from workers.methods import card, knob
from workers.session import Session


class HiRED(ChoosesImageTokens):
    """Keep the image tokens that CLS attends to, with a budget for each tile by what its region holds.

    Arif et al. 2024, arXiv:2408.10945, section 4: a part of the budget goes to the whole image, the rest to the
    tiles in proportion to how many of the strongest patches of the first layer's CLS attention fall into them; in
    each view the tokens with the most CLS attention in the layer the features come from stay. Deviations: the
    released code finds a tile's region by cutting the map into horizontal strips (option ``strips``), where the
    paper means the tile's own part of the image; and line breaks between tiles stay, so that a budget of 100 % is
    the model as it is. Frames of a clip are whole images with equal budgets.
    """

    card: ClassVar[Card] = card(
        id="hired",
        title="HiRED",
        paper="arXiv:2408.10945",
        traits=("cls-token",),
        **CHOOSES_IMAGE_TOKENS | {"hopes": {"ttft_s": "down", "prefill_tokens_per_s": "up"}},
    )
    alpha: float = knob(0.5, ge=0.0, le=1.0, help="share of the budget for the whole image; the rest goes to its tiles")
    strips: bool = knob(False, help="find the tiles' regions as the released code does (horizontal strips)")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Watch CLS in two layers of the encoder; choose when the image is encoded."""
        return self._choosing(session)

    @contextmanager
    def _choosing(self, session: Session) -> Iterator[None]:
        noting: dict[str, Tensor] = {}
        last = feature_layers(session) - 1

        def watch(call: VisionCall) -> None:
            if call.layer in (0, last):
                attention = call.cls_attention()  # [P, C]
                noting.update({name: attention for name, layer in (("first", 0), ("last", last)) if layer == call.layer})

        def choose(visual: Visual, keep: float) -> Selection:
            return Selection(self.select(visual, keep, visual.noted["first"], visual.noted["last"]))

        with session.hooked(session.vision_observers, watch), selecting(session, self.card.id, self.keep, choose, noting):
            yield

    def select(self, visual: Visual, keep: float, first: Tensor, last: Tensor) -> Tensor:
        """Tokens that stay, ascending.

        Args:
            first, last: CLS attention [P, C] in the first layer and in the one the features come from; view 0 is the whole image.
        """
        views, cells = last.shape
        counts = self.budgets(keep, views, cells, first[0], visual.side, visual.tiles)
        stays = torch.zeros(views, cells, dtype=torch.bool, device=last.device)
        for view, count in enumerate(counts):
            stays[view, last[view].sort(descending=True, stable=True).indices[:count]] = True
        return visual.with_breaks((visual.placed & stays.flatten()[visual.rows.clamp_min(0)]).nonzero()[:, 0])

    def budgets(
        self, keep: float, views: int, cells: int, first: Tensor, side: tuple[int, int], tiles: tuple[int, int]
    ) -> list[int]:
        """Tokens of each view; together at most ``keep`` of all.

        Args:
            first: [C] CLS attention of the whole image in the first layer.
        """
        total = max(1, int(views * cells * keep))
        if views == 1 or not tiles[0] or total >= views * cells:
            return [min(max(1, total // views), cells)] * views
        whole = min(int(total * self.alpha), cells)
        rest = min(total - whole, (views - 1) * cells)
        marked = torch.zeros(cells, device=first.device)
        marked[first.sort(descending=True, stable=True).indices[: int(cells * (1 - self.alpha))]] = 1.0
        counts = self.marks(marked, views - 1, side, tiles)
        marks = max(1.0, float(counts.sum()))
        tiled = [min(int(rest * c / marks + 1e-6), cells) for c in counts.tolist()]  # whole numbers stay whole
        return [whole if whole or any(tiled) else 1, *tiled]

    def marks(self, marked: Tensor, tiles: int, side: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """How much of the marked area [C] lies in each tile [tiles].

        A patch that a border between tiles runs through counts for both by its parts.
        """
        if self.strips:
            return torch.stack([part.sum() for part in marked.tensor_split(tiles)])
        rows, columns = (coverage(*pair).to(marked.device) for pair in zip(side, grid, strict=True))
        return (rows @ marked.view(side) @ columns.T).flatten()


def coverage(cells: int, parts: int) -> Tensor:
    """[parts, cells] how much of each of ``cells`` equal pieces of a line lies in each of ``parts`` equal pieces of it."""
    edges = torch.arange(cells + 1, dtype=torch.float64) / cells
    low, high = torch.arange(parts, dtype=torch.float64) / parts, torch.arange(1, parts + 1, dtype=torch.float64) / parts
    overlap = torch.minimum(edges[1:], high[:, None]) - torch.maximum(edges[:-1], low[:, None])
    return (overlap.clamp_min(0) * cells).round(decimals=9).float()
