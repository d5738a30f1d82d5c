"""A split model with some of its experts a token: those that its router ranks first, or those that are in fact the largest.

Shapes: T tokens; C hidden width; E experts; K experts a token visits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Routed = tuple[Tensor, Tensor, Tensor]  # of a router: logits [T, E], weights [T, K], indices [T, K]


@contextmanager
def choosing(model: Any, experts: int, oracle: bool = False) -> Iterator[None]:
    """Let tokens of a split model visit fewer experts for a while; what they put out is summed as it is.

    Args:
        oracle: not those that the router ranks first, but those whose outputs are in fact the largest.
    """
    blocks = [layer.mlp for layer in model.model.layers]
    before = [block.gate.top_k for block in blocks]
    hooks = []
    for block in blocks:
        block.gate.top_k = experts
        if oracle:
            hooks.append(block.gate.register_forward_hook(_largest(block.experts)))
    try:
        yield
    finally:
        for block, top_k in zip(blocks, before, strict=True):
            block.gate.top_k = top_k
        for hook in hooks:
            hook.remove()


def _largest(experts: Any) -> Callable[[Any, tuple[Tensor], Routed], Routed]:
    """A router's hook that puts the experts with the largest outputs in the place of those that it chose."""

    def choose(router: Any, args: tuple[Tensor], out: Routed) -> Routed:
        logits, _, chosen = out
        sizes = output_sizes(experts, args[0].reshape(-1, args[0].shape[-1]))
        indices = sizes.topk(chosen.shape[1], dim=-1).indices
        return logits, logits.softmax(-1).gather(1, indices), indices

    return choose


def output_sizes(experts: Any, x: Tensor) -> Tensor:
    """Euclidean norm of what each expert would put out for each token of x [T, C]: [T, E]."""
    found = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
        found.append(nn.functional.linear(experts.act_fn(gate) * up, down).norm(dim=-1))
    return torch.stack(found, 1)
