"""Fewer tokens from a frame: pooled cells, and a box cut out of its grid.

Shapes: F frames, h x w cells of a frame, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Sides = tuple[int, int]  # rows, columns


def widest(cells: Tensor, columns: int) -> Tensor:
    """So many neighbours of a row pooled to one by their maximum: [F, h, w, D] -> [F, h, ceil(w / columns), D]."""
    return F.max_pool2d(cells.movedim(-1, 1), (1, columns), ceil_mode=True).movedim(1, -1) if columns > 1 else cells


def averaged(cells: Tensor, side: int) -> Tensor:
    """Every frame averaged to at most ``side`` x ``side`` cells: [F, h, w, D] -> [F, min(side, h), min(side, w), D]."""
    return F.adaptive_avg_pool2d(cells.movedim(-1, 1), averaged_side(cells.shape[1:3], side)).movedim(1, -1)


def averaged_side(side: Sides, most: int) -> Sides:
    """Rows and columns that are left of an averaged frame."""
    return min(most, side[0]), min(most, side[1])


def averaged_groups(place: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Which token stands for each averaged cell, and for each token of a frame the one that stands for it.

    Args:
        place: [F, h, w] the token of each cell.

    Returns:
        ([F, min(most, h), min(most, w)], [F, h, w]).
    """
    firsts, parts = [], []
    for cells, count in zip(place.shape[1:], averaged_side(place.shape[1:], most), strict=True):
        parts.append(torch.arange(cells, device=place.device) * count // cells)
        firsts.append((torch.arange(count, device=place.device) * cells + count - 1) // count)  # the first cell of each part
    anchors = place[:, firsts[0]][:, :, firsts[1]]
    return anchors, anchors[:, parts[0]][:, :, parts[1]]


def with_neighbours(group: Tensor, index: Tensor, columns: int) -> Tensor:
    """Groups [F * h * w], where tokens ``index`` stand for themselves and their neighbours up to so many columns.

    Args:
        group: [F, h, w].
    """
    width, group = group.shape[2], group.flatten()
    for n in range(columns):
        inside = index[index % width + n < width]
        group[inside + n] = inside
    return group


def evenly(count: int, frames: int) -> Tensor:
    """``count`` frames spread over all, the first one among them: [min(count, frames)]."""
    count = min(count, frames)
    return torch.arange(count) * frames // max(1, count)


def box_size(side: Sides, share: float) -> Sides:
    """Rows and columns of a box of about this share of the cells, shaped like the grid; at least one cell."""
    return max(1, round(side[0] * math.sqrt(share))), max(1, round(side[1] * math.sqrt(share)))


def box_at(scores: Tensor, share: float) -> Tensor:
    """Top left cells [F, 2] of the boxes around the best cells.

    The box lies around the mean place of the best ``int(h * w * share)`` cells (one at least), moved into the grid.

    Args:
        scores: [F, h, w]; of equals the earlier one counts as the better.
    """
    h, w = scores.shape[1:]
    best = scores.flatten(1).sort(descending=True, stable=True).indices[:, : max(1, int(h * w * share))]
    height, width = box_size((h, w), share)
    places = torch.stack([best // w, best % w], -1).double().mean(1)  # [F, 2] row, column
    corner = (places - torch.tensor([height - 1, width - 1], device=places.device) / 2 + 0.5).floor().long()
    return corner.clamp_min(0).minimum(torch.tensor([h - height, w - width], device=corner.device))


def box_cells(corners: Tensor, size: Sides, side: Sides) -> Tensor:
    """Cells [F, rows * columns] of boxes in reading order, as indices into a frame's h * w cells."""
    rows = corners[:, :1] + torch.arange(size[0], device=corners.device)  # [F, rows]
    columns = corners[:, 1:] + torch.arange(size[1], device=corners.device)
    return (rows[:, :, None] * side[1] + columns[:, None, :]).flatten(1)
