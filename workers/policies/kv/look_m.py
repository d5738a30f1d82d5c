"""LOOK-M."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from torch import Tensor

from studio_state.catalog import Card
from studio_state.resources import Use
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import FREE, Guarded, Kept
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.gathered_attention import GatheredAttention
from workers.mechanisms.merging import into_nearest
from workers.methods import card, knob
from workers.session import Session

IMAGE = "image"  # in HeadGroup.tracked: which entries come from an image
MERGES = ["averaged", "pivotal", "weighted"]


class LookM(GatheredAttention):
    """Evict image positions before words by the attention of the prompt, and merge what leaves into what stays.

    Wan et al. 2024, arXiv:2406.18139: at the end of the prompt every position has the sum of attention paid to it;
    words get the largest sum on top, so that they come before all image positions (text prior). The best ones stay
    with the newest, and every other key and value is folded into the kept entry of the most similar key. On prompts
    without an image the choice is H2O's, made once. Deviations: half of the prompt is kept unless set otherwise (the
    paper keeps a fifth of thousands of tokens), and budgets are rounded; the query heads of one KV head are averaged
    (the paper's models have no grouped queries). The released code keeps every word whatever the budget (here
    ``keep_all_text``), its filter pairs up entries of equal rank in different heads (here every head by itself), and
    its averaged rule applies it to the targets but not to what is merged; the paper's rules are built here, and the
    filter leaves out an entry altogether.
    """

    card: ClassVar[Card] = card(
        id="look-m",
        title="LOOK-M",
        paper="arXiv:2406.18139",
        **EVICTS,
        uses=(
            Use(resource="kv.values", mode="edits", when={"merge": MERGES}),
            # merged entries are written in full precision, so nobody may have packed the cache by then
            Use(resource="kv.dtype", mode="edits", when={"merge": MERGES, "when": ["decode", "both"]}),
        ),
    )
    text_prior: bool = knob(True, help="words stay before image positions, whatever attention they got; off = as H2O")
    text_rule: Literal["strict_topN", "keep_all_text"] = knob(
        "strict_topN", help="strict_topN = words beyond the budget leave too; keep_all_text = every word stays, over the budget"
    )
    merge: Literal["none", "averaged", "pivotal", "weighted"] = knob(
        "pivotal", help="what leaves: none = is dropped; else is folded into what stays, pivotal = half as much as averaged"
    )
    filter: bool = knob(False, help="drop instead of merging what is less similar to any kept key than the mean")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        with session.hooked(session.observers, self.mark), super()._evicting(session):
            yield

    def mark(self, call: AttentionCall) -> None:
        """Remember which of the new entries come from an image."""
        new = call.forward.image_tokens_at(call.layer)
        if new is not None:
            image = image_entries(call).clone()
            image[:, :, image.shape[2] - new.shape[1] :] = new[:, None]
            call.cache.track(IMAGE, image)

    def scores(self, call: AttentionCall) -> Tensor:
        """Gathered attention [B, H, S]; that of words plus the largest of their row."""
        sums = super().scores(call).double()  # so that what is added does not swallow small sums
        if not self.text_prior:
            return sums
        return sums + sums.amax((1, 2), keepdim=True) * ~image_entries(call)

    def counts(self, call: AttentionCall, guarded: Guarded = FREE) -> list[int]:
        """The budget of each row, or as many as its newest and all words before them."""
        counts = super().counts(call, guarded)
        if self.text_rule == "strict_topN":
            return counts
        words, real = ~image_entries(call), call.held.real
        words = words if real is None else words & real
        newest = guarded.newest(len(counts))
        older = [int(w[:, : w.shape[1] - r].sum(-1).max()) for w, r in zip(words, newest, strict=True)]
        return [max(n, r + w) for n, r, w in zip(counts, newest, older, strict=True)]

    def fold(self, session: Session, call: AttentionCall, kept: Kept) -> tuple[Tensor, Tensor] | None:
        """Fold every entry that leaves into the kept one with the most similar key."""
        return None if self.merge == "none" else into_nearest(call.held, kept, self.merge, self.filter)


def image_entries(call: AttentionCall) -> Tensor:
    """Which entries of a layer come from an image: bool [B, H, S]."""
    held = call.held
    return held.tracked.get(IMAGE, torch.zeros(held.keys.shape[:3], dtype=torch.bool, device=held.keys.device))
