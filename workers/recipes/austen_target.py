"""A dense language model of Jane Austen's novels: the large one of a pair for speculative decoding."""

from __future__ import annotations

from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.methods import card, knob
from workers.training.novel_recipe import HEAD, SHARING, Ids, NovelRecipe, small_llama


class AustenTarget(NovelRecipe):
    """Train a small Llama on Jane Austen's novels.

    Touvron et al. 2023, arXiv:2302.13971, with grouped queries (Ainslie et al. 2023, arXiv:2305.13245): six layers,
    2.8 M parameters, three heads to a key. ``austen-draft`` has the same tokenizer and guesses for it.
    """

    card: ClassVar[Card] = card(
        id="austen-target", title="Llama on Jane Austen", kind="recipe", families=("llm",), paper="arXiv:2302.13971"
    )

    layers: int = knob(6, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(192, ge=96, le=1536, multiple_of=HEAD * SHARING, help="hidden size; more = slower and better")

    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""
        return small_llama(self, ids, vocabulary, self.layers, self.width)
