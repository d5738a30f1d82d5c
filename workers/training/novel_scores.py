"""What is measured on held-out text beside likelihood: how experts share the work, and how well a draft model guesses.

Shapes: T tokens; E experts; V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.training.novel_lessons import windows

Say = Callable[[str, float | None], None]
SHUFFLES_SEED = 0


def silent(text: str, done: float | None) -> None:
    """Tell nobody."""


def balance_loss(router_logits: Sequence[Tensor], chosen: int) -> Tensor:
    """How unevenly tokens are shared among experts, mean of the layers: 1 = evenly, E = one expert has all.

    Fedus et al. 2021, arXiv:2101.03961, equation 4, with the share of choices: E * sum of (share of choices * mean probability).
    Over the whole batch, so that a text or a kind of token may have experts of its own. The library's own function counts
    all layers together, where one layer can make up for another.

    Args:
        router_logits: of each layer, [T, E].
        chosen: experts a token.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        experts = logits.shape[-1]
        load = torch.bincount(probabilities.topk(chosen, -1).indices.flatten(), minlength=experts) / (chosen * len(logits))
        losses.append(experts * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.inference_mode()
def routing_scores(model: Any, ids: Sequence[int], chosen: int, say: Say = silent) -> dict[str, float]:
    """How the experts are used on a text.

    Returns:
        ``expert_load_least`` and ``expert_load_most``: the smallest and the largest share of the choices that an expert
        of any layer gets (1 / E each, were all equal); ``token_expert_bits``: what knowing a token tells of its first
        expert, mean of the layers, beyond what shuffled experts seem to tell (0 = nothing, log2 E = all).
    """
    tokens: list[Tensor] = []
    choices: list[Tensor] = []  # of each window: [layers, tokens, chosen]
    for window in windows(ids):
        say("scoring: experts", None)
        found = model(input_ids=window.ids, use_cache=False, output_router_logits=True).router_logits
        tokens.append(window.scored)
        choices.append(torch.stack([layer[window.first :].float().topk(chosen, -1).indices for layer in found]))
    experts = model.config.num_experts
    by_layer = torch.cat(choices, 1).numpy()
    loads = np.stack([np.bincount(layer.ravel(), minlength=experts) / layer.size for layer in by_layer])
    seen, rng = torch.cat(tokens).numpy(), np.random.default_rng(SHUFFLES_SEED)
    bits = [shared_bits(seen, first) - shared_bits(seen, rng.permutation(first)) for first in by_layer[:, :, 0]]
    return {
        "expert_load_least": float(loads.min()),
        "expert_load_most": float(loads.max()),
        "token_expert_bits": float(np.mean(bits)),
    }


def shared_bits(a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]]) -> float:
    """Mutual information of two rows of labels [T], counted: what one tells of the other, in bits."""
    table = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(table, (a, b), 1 / len(a))
    alone = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    there = table > 0
    return float((table[there] * np.log2(table[there] / alone[there])).sum())


@torch.inference_mode()
def pair_scores(target: Any, draft: Any, ids: Sequence[int], say: Say = silent) -> dict[str, float]:
    """How well a draft model guesses the target's next token, where both read the same text.

    Returns:
        ``greedy_agreement``: share of the tokens where the likeliest one is the same; ``expected_acceptance``: mean of
        sum(min(p, q)), the chance that a guess drawn from the draft is kept (Leviathan et al. 2022, arXiv:2211.17192, theorem 3.5).
    """
    same, kept = [], []
    for window in windows(ids):
        say("scoring: draft against target", None)
        p, q = (window.at_scored(m(input_ids=window.ids, use_cache=False).logits).softmax(-1) for m in (target, draft))
        same.append(p.argmax(-1) == q.argmax(-1))
        kept.append(torch.minimum(p, q).sum(-1))
    return {
        "greedy_agreement": torch.cat(same).float().mean().item(),
        "expected_acceptance": torch.cat(kept).mean().item(),
    }
