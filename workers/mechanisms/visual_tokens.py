"""Choosing which image tokens enter the language model, and the record of what became of them.

A selector sees the image tokens of one image and names those that stay. The family removes the
others physically: their placeholders leave the prompt, so that every later layer, cache and
position is that of a shorter prompt.

Shapes: n image tokens in the order in which the language model reads them, P views (whole image, tiles),
C cells of a view, D width of the language model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workers.cards import knob
from workers.methods import Policy
from workers.session import Session

if TYPE_CHECKING:
    from workers.families.image_layout import ImageLayout

CHOOSES_IMAGE_TOKENS: dict[str, Any] = {
    "stage": "tokens",
    "families": ("vlm",),
    "owns": ("tokens.visual",),
    "effects": {"visual_tokens": "down", "prefill_kv_bytes": "down", "kept_prompt_tokens": "down"},
    "hopes": {"ttft_s": "down"},
    "neutral": {"keep": 1.0},
}  # what the cards of policies that choose which image tokens enter the language model have in common


class ChoosesImageTokens(Policy):
    """A policy that lets a share of the image tokens into the language model."""

    keep: float = knob(
        0.2, ge=0.01, le=1.0, help="share of image tokens that enter the language model; lower = faster, sees less"
    )

    def kv_factor(self) -> float:
        """Prompts with an image are mostly image tokens."""
        return self.keep


LEVELS = tuple(round(0.01 * i, 2) for i in range(1, 101))  # settings of keep that the screen's slider can show
FINE_UP_TO = 256  # image tokens; of more, every fifth of these settings is tried


@dataclass(frozen=True)
class Visual:
    """The image tokens of one image, about to enter the language model.

    Attributes:
        features: [n, D].
        rows: [n] flat index (view * C + cell) into what the projector gave, -1 for a line break between tiles.
        cells: C; side: (rows, columns) of cells of a view; tiles: (rows, columns) of the tile grid, zeros for one view.
        views: [n] 0 = the whole image, 1.. = tiles in reading order.
        seed: of the item, for selectors that draw.
        frames: of a clip; each has as many tokens, one frame after the other.
        asked: the words that came with the image.
        noted: what the selector's policy noted of this image while it was encoded.
    """

    features: Tensor
    rows: Tensor
    views: Tensor
    side: tuple[int, int]
    tiles: tuple[int, int]
    seed: int
    frames: int = 1
    asked: str = ""
    noted: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Cells of one view."""
        return self.side[0] * self.side[1]

    @property
    def placed(self) -> Tensor:
        """Which tokens are of a patch [n] (line breaks are not)."""
        return self.rows >= 0

    def budget(self, keep: float) -> int:
        """Patch tokens that a share leaves: rounded, at least one."""
        return max(1, round(keep * int(self.placed.sum())))

    def best(self, scores: Tensor, count: int) -> Tensor:
        """Index (ascending) of the ``count`` best patch tokens and of every line break.

        Args:
            scores: [n]; of equals the earlier one stays.
        """
        scores = scores.masked_fill(~self.placed, float("-inf"))
        chosen = scores.sort(descending=True, stable=True).indices[:count]
        return self.with_breaks(chosen)

    def with_breaks(self, chosen: Tensor) -> Tensor:
        """These tokens and every line break, ascending: the language model still sees where rows of patches end."""
        return torch.cat([chosen, (~self.placed).nonzero()[:, 0]]).sort().values


@dataclass(frozen=True)
class Selection:
    """What stays.

    Attributes:
        index: [k] into the image tokens, ascending; or in the order in which the language model reads them, where a token
            may stand more than once (itself, and for a pooled part of the image).
        features: [k, D] where they are not those that came in (merged or pooled tokens).
        group: [n] which kept token each token was merged into (-1 = none), where tokens were merged.
    """

    index: Tensor
    features: Tensor | None = None
    group: Tensor | None = None


Choose = Callable[[Visual, float], Selection]


@dataclass(frozen=True)
class Selector:
    """A policy's choice.

    Attributes:
        keep: the share it keeps, at which it is asked.
        choose: (tokens, share) -> what stays; a function of these alone, so that other shares can be tried afterwards.
        noting: where the policy's hooks in the encoder note what ``choose`` will find as ``noted`` of the tokens. The
            next image overwrites it.
        ranked: its choice depends on the share; False where it only hands on what was merged before.
    """

    policy: str
    keep: float
    choose: Choose
    noting: Mapping[str, Tensor] = field(default_factory=dict)
    ranked: bool = True


@dataclass
class ImageRecord:
    """What became of the image tokens of one row, for the screen.

    Attributes:
        entered: the tokens that entered the language model, in its order.
        share: per token how much of the model worked on it.
        level: per token the smallest ``keep`` at which it stays; empty if unknown.
        group: per token the group it was merged into; empty if none were.
        rank: levels worked out after the run: called with no argument, outside every timing.
    """

    layout: ImageLayout | None = None
    entered: list[int] = field(default_factory=list)
    share: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    rank: Callable[[], list[float]] | None = None


@contextmanager
def selecting(
    session: Session, policy: str, keep: float, choose: Choose, noting: Mapping[str, Tensor] | None = None, ranked: bool = True
) -> Iterator[None]:
    """Have image tokens chosen before they enter the language model (see :class:`Selector`)."""
    with session.hooked(session.selectors, Selector(policy, keep, choose, {} if noting is None else noting, ranked)):
        yield


def seed_of(seed: int, item: str) -> int:
    """A seed for one item of an experiment: the same in every run and lane, another one for other items."""
    return zlib.crc32(f"{seed} {item}".encode())


def select(session: Session, visual: Visual, record: ImageRecord) -> tuple[Tensor, Tensor]:
    """Ask all selectors in turn.

    Returns:
        (index [k] of the tokens that stay, features [k, D]).
    """
    index = torch.arange(len(visual.features), device=visual.features.device)
    features = visual.features
    for selector in session.selectors:
        visual = replace(visual, noted=dict(selector.noting))
        chosen = selector.choose(visual, selector.keep)
        dropped = max(0, len(visual.features) - len(chosen.index))  # pooled beside whole ones they may be more
        changed = dropped if chosen.features is None else dropped + 1
        if changed:
            session.did(selector.policy, changed)
        if selector.ranked:
            record.rank = partial(levels, selector, visual, index, len(record.share))
        if chosen.group is not None:
            record.group = widened(chosen.group, index, len(record.share))
        features = visual.features[chosen.index] if chosen.features is None else chosen.features
        index = index[chosen.index]
        visual = replace(visual, features=features, rows=visual.rows[chosen.index], views=visual.views[chosen.index])
    return index, features


def widened(group: Tensor, index: Tensor, total: int) -> list[int]:
    """Groups of the tokens that a selector saw, for all tokens of the image (-1 where it saw none)."""
    out = torch.full((total,), -1, dtype=torch.long)
    out[index.cpu()] = group.cpu()
    return out.tolist()


def levels(selector: Selector, visual: Visual, index: Tensor, total: int) -> list[float]:
    """Per token the smallest share at which the selector keeps it; 2 = at none (another selector had dropped it before)."""
    out = torch.full((total,), 2.0, dtype=torch.float64)
    for keep in sorted({*(LEVELS if total <= FINE_UP_TO else LEVELS[4::5]), selector.keep}, reverse=True):
        stays = index[selector.choose(visual, keep).index].cpu()
        out[stays] = keep
    return out.tolist()


def rank_levels(order: Sequence[int], total: int, keep: float) -> list[float]:
    """Levels from an order of preference, the best token first, of which a share leaves so many as rounding says.

    Args:
        total: image tokens; those not in the order stay at no share.
        keep: the share that is set, a level beside those of the slider.
    """
    out = [2.0] * total
    for share in sorted({*LEVELS, keep}, reverse=True):
        for token in order[: max(1, round(share * len(order)))]:
            out[token] = share
    return out
