"""Drawing the next token. The same seed gives the same draws in every lane."""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from studio_state.experiment import Sampling


class Sampler:
    """Greedy, or temperature with top-k and top-p.

    Args:
        sampling: how to draw; temperature 0 = the most likely token.
        seed: of the draws, on their own generator.
    """

    def __init__(self, sampling: Sampling, seed: int, device: torch.device):
        self.sampling = sampling
        self.generator = torch.Generator(device=device).manual_seed(seed)

    @property
    def greedy(self) -> bool:
        """True if the draw is deterministic."""
        return self.sampling.temperature == 0

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids [B] from logits [B, V]."""
        if self.greedy:
            return most_likely(logits)
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)[:, 0]

    def twin(self) -> Sampler:
        """A sampler that will draw with the random numbers that this one will draw with; each uses up its own."""
        twin = copy(self)
        if not self.greedy:
            twin.generator = torch.Generator(device=self.generator.device)
            twin.generator.set_state(self.generator.get_state())
        return twin

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution [B, V] that is drawn from."""
        logits = logits.float() / self.sampling.temperature
        if 0 < self.sampling.top_k < logits.shape[-1]:
            floor = logits.topk(self.sampling.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < floor, float("-inf"))
        if self.sampling.top_p < 1:
            ordered, index = logits.sort(descending=True)
            probs = ordered.softmax(-1)
            tail = probs.cumsum(-1) - probs >= self.sampling.top_p  # the most likely token always stays
            logits = torch.full_like(logits, float("-inf")).scatter(-1, index, ordered.masked_fill(tail, float("-inf")))
        return logits.softmax(-1)


def most_likely(logits: Tensor) -> Tensor:
    """Ids [B] of the largest of logits [B, V], the first where several are equal; numpy looks for it much faster than PyTorch on a CPU."""
    if logits.is_cpu and logits.dtype == torch.float32:
        return torch.from_numpy(logits.numpy().argmax(-1))
    return logits.argmax(-1)
