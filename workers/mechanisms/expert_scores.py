"""How much a text needs each expert: counted while the model reads it, before a policy takes experts out.

Shapes: T tokens of a window; E experts of a layer; K experts a token visits; C hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workers.data.novels import held_out
from workers.mechanisms.experts import MoEBlock, RouterCall, known_blocks, routed
from workers.session import Session

WINDOW = 512  # tokens that the model reads at once


@torch.inference_mode()
def expert_scores(session: Session, kind: str, tokens: int, title: str) -> dict[MoEBlock, Tensor]:
    """A score for every expert, higher = needed more, from the end of *Persuasion*.

    Args:
        kind: ``frequency``: visits; ``weight``: sum of the router's weights; ``output``: mean of weight times norm of the
            output, over an expert's visits (REAP, arXiv:2510.13999), 0 for one that has none.
        tokens: read at most, in windows without overlap.
        title: of the policy, to tell progress.

    Returns:
        Per block float64 [E].
    """
    sums = {b: torch.zeros(2, b.count, dtype=torch.float64, device=session.device) for b in known_blocks(session)}

    def see(call: RouterCall) -> None:
        visits = call.indices.flatten()  # [T * K]
        value = torch.ones_like(call.weights) if kind == "frequency" else call.weights
        if kind == "output":
            value = value * output_norms(session.model.get_submodule(call.block.experts), call)
        sums[call.block][0].index_add_(0, visits, value.flatten().double())
        sums[call.block][1].index_add_(0, visits, torch.ones_like(visits, dtype=torch.float64))

    windows = calibration_windows(session, tokens)
    with routed(session, see):
        for i, window in enumerate(windows):
            session.check_cancelled()
            session.say(f"{title}: reading", i / len(windows))
            session.family.backbone(session.model)(input_ids=torch.tensor([window], device=session.device), use_cache=False)
    if kind != "output":
        return {b: s[0] for b, s in sums.items()}
    return {b: s[0] / s[1].clamp_min(1) for b, s in sums.items()}


def output_norms(experts: Any, call: RouterCall) -> Tensor:
    """Euclidean norm of what each chosen expert puts out for its token, not yet weighted [T, K]."""
    one = torch.ones_like(call.weights[:, :1])
    norms = [experts(call.hidden, call.indices[:, k : k + 1], one).float().norm(dim=-1) for k in range(call.indices.shape[1])]
    return torch.stack(norms, 1)


def calibration_windows(session: Session, tokens: int) -> list[Sequence[int]]:
    """The first tokens of the text, cut into windows that fit the model's context."""
    ids = list(session.processor(held_out(), add_special_tokens=False, verbose=False)["input_ids"])[:tokens]
    size = min(WINDOW, session.info.context or WINDOW)
    return [ids[start : start + size] for start in range(0, len(ids), size)]
