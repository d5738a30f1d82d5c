"""How the experts of a model share the work: counted in every lane alike, on the device, and read when a run is over.

Every forward of a run counts, tokens that were drafted and refused included; padding does not. A shared expert, which
every token visits, is not among them.

Shapes: B rows of a batch; T tokens of all rows together; E experts of a layer; K experts a token visits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import log
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from workers.mechanisms.attention import active_forward
from workers.mechanisms.cache import PADDING
from workers.mechanisms.experts import MoEBlock, RouterCall, blocks, routed
from workers.session import Session


class ExpertLoad:
    """Visits to every expert, by layer and by row.

    Args:
        rows: of the batch that will run.
    """

    def __init__(self, session: Session, rows: int):
        self.rows, self.layers = rows, session.info.layers
        self.blocks = blocks(session)
        self.originals: dict[MoEBlock, Sequence[int]] = {}
        self.visits: dict[MoEBlock, Tensor] = {}  # flat [B * (E + 1)]; the last of each row gathers what does not count
        self.tokens: dict[MoEBlock, int | Tensor] = dict.fromkeys(self.blocks, 0)
        for block in self.blocks:
            router: Any = session.model.get_submodule(block.router)
            self.originals[block] = getattr(router, "originals", range(block.count))
            self.visits[block] = torch.zeros(rows * (router.num_experts + 1), dtype=torch.long, device=session.device)
        self.one = torch.ones(1, dtype=torch.long, device=session.device)

    def see(self, call: RouterCall) -> None:
        """Count one decision; nothing waits for the device."""
        indices, forward = call.indices, active_forward()
        tokens: int | Tensor = len(indices)
        if forward is not None and self.rows > 1:
            positions = forward.positions_at(call.block.layer)  # [B, T / B]
            if forward.padded and forward.phase == "prefill":
                real = positions.flatten() != PADDING
                indices, tokens = indices.masked_fill(~real[:, None], call.count), real.sum()
            row = torch.arange(self.rows, device=indices.device)[:, None].expand_as(positions)
            indices = indices + (call.count + 1) * row.reshape(-1, 1)
        self.visits[call.block].scatter_add_(0, indices.flatten(), self.one.expand(indices.numel()))
        self.tokens[call.block] = self.tokens[call.block] + tokens

    def metrics(self) -> dict[str, float]:
        """``expert_load_entropy``, ``experts_used`` and ``expert_top_k``: means of the layers that ran; {} if there are none."""
        evenness, used, visited = [], [], []
        for block in self.blocks:
            counts = self._counts(block).sum(0).tolist()
            if not (tokens := int(self.tokens[block])):
                continue
            evenness.append(entropy(counts))
            used.append(sum(n > 0 for n in counts))
            visited.append(sum(counts) / tokens)
        if not used:
            return {}
        return {"expert_load_entropy": fmean(evenness), "experts_used": fmean(used), "expert_top_k": fmean(visited)}

    def tables(self) -> list[list[list[float]]]:
        """Per row and decoder layer each expert's share of the visits; [] for layers without experts, 0 for experts pruned."""
        if not self.blocks:
            return []
        out: list[list[list[float]]] = [[[] for _ in range(self.layers)] for _ in range(self.rows)]
        for block in self.blocks:
            for row, counts in enumerate(self._counts(block).tolist()):
                shares, total = [0.0] * block.count, max(1, sum(counts))
                for expert, n in zip(self.originals[block], counts, strict=True):
                    shares[expert] = n / total
                out[row][block.layer] = shares
        return out

    def _counts(self, block: MoEBlock) -> Tensor:
        """Visits [B, experts that are there]."""
        return self.visits[block].view(self.rows, -1)[:, :-1].cpu()


def entropy(counts: Sequence[int]) -> float:
    """Entropy of the shares over its largest possible value: 1 = all equal, 0 = one has all. A single one has all and 1."""
    total = sum(counts)
    shares = [n / total for n in counts if n]
    return sum(p * log(1 / p) for p in shares) / log(len(counts)) if len(counts) > 1 else 1.0


@contextmanager
def counting_experts(session: Session, rows: int) -> Iterator[ExpertLoad]:
    """Count visits for a while, as the attached policies decide them; nothing happens on a model without experts."""
    load = ExpertLoad(session, rows)
    with routed(session, load.see):
        yield load
