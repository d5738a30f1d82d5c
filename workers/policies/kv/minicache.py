"""MiniCache."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.merged_layers import merged_stores
from workers.methods import Policy, card, knob
from workers.session import Session


class MiniCache(Policy):
    """Let pairs of neighbouring deep layers share the directions of their cached keys and values.

    Liu et al. 2024, arXiv:2405.14366, section 4: from the middle layer on, of every two layers one unit vector an entry
    is kept, at ``share`` of the arc between both (SLERP), and each layer's lengths; entries whose angle is in the
    uppermost ``retention`` of the range of angles stay apart. Deviations: pairs are counted from the last layer, so
    that none of the deep ones is left over, and there is at least one; every KV head is a vector of its own (the paper
    takes all heads of a token as one), and so are keys and values; retained entries take no place among the shared
    ones; entries generated later stay as they are, where the paper merges them too. Attention reads a restored copy,
    so bytes fall and time does not.
    """

    card: ClassVar[Card] = card(
        id="minicache",
        title="MiniCache",
        paper="arXiv:2405.14366",
        stage="kv",
        families=("llm", "vlm"),
        owns=("kv.dtype", "kv.values"),
        needs=("kv.uniform",),
        effects={"kv_bytes": "down", "prefill_kv_bytes": "down"},
        neutral={"retention": 1.0},
    )
    depth: float = knob(
        0.5, ge=0.0, le=1.0, help="share of the layers, from the first on, that stay as they are; lower = smaller"
    )
    share: float = knob(0.6, ge=0.0, le=1.0, help="where the common direction lies: 0 = the lower layer's, 1 = the upper one's")
    retention: float = knob(
        0.05, ge=0.0, le=1.0, help="uppermost share of the range of angles that stays unmerged; higher = more exact, larger"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Merge once the prompt is cached."""

        def merge_pairs(cache: StudioCache, forward: Forward) -> None:
            filled = [layer for layer in cache.kv_layers if layer.groups]
            for lower, upper in self.pairs(len(filled)):
                first, second = filled[lower].group, filled[upper].group
                below, above = first.held(), second.held()
                if below.keys.shape == above.keys.shape:  # layers of one model may differ in heads and widths
                    first.store, second.store = merged_stores(below, above, self.share, self.retention)
                    session.did(self.card.id, first.store.length)

        return nullcontext() if self.is_neutral else session.hooked(session.storage, merge_pairs)

    def pairs(self, layers: int) -> list[tuple[int, int]]:
        """Pairs of neighbours among so many layers, the deepest last."""
        count = min(layers // 2, max(1, (layers - round(self.depth * layers)) // 2))
        return [(i, i + 1) for i in range(layers - 2 * count, layers, 2)]

    def kv_factor(self) -> float:
        """Half of the merged layers' bytes; what stays apart depends on the prompt and is not known here."""
        return (1 + self.depth) / 2
