"""A tiny language model of Jane Austen's novels that guesses for a larger one: the small one of a pair."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.methods import card, knob
from workers.models.load import load_tokenizer
from workers.models.resolve import Resolved, resolve
from workers.training.loop import TrainingRun
from workers.training.novel_recipe import HEAD, SHARING, Ids, NovelRecipe, small_llama
from workers.training.novel_scores import pair_scores


class AustenDraft(NovelRecipe):
    """Train a draft model for speculative decoding on Jane Austen's novels.

    Leviathan et al. 2022, arXiv:2211.17192: a Llama of one layer, 0.3 M parameters, with the tokenizer of the other
    models of the novels. It learns from the novels alone, not from the target. Given a target, it says how often its guesses hold.
    """

    card: ClassVar[Card] = card(
        id="austen-draft", title="Draft Llama on Jane Austen", kind="recipe", families=("llm",), paper="arXiv:2211.17192"
    )

    steps: int = knob(5000, ge=1, le=1_000_000, help="optimizer steps; more = better, up to about ten passes over the text")
    layers: int = knob(1, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(96, ge=96, le=1536, multiple_of=HEAD * SHARING, help="hidden size; more = slower and better")
    target: str = knob(
        "",
        max_length=4096,
        format="path",
        help="a model of the novels, by zoo id or folder, that the guesses are compared with; empty = none",
    )

    def check(self, tokenizer: Any) -> None:
        """Find the target, and see that its tokens are the same."""
        if not self.target:
            return
        theirs = load_tokenizer(self._resolved()).get_vocab()
        if theirs != tokenizer.get_vocab():
            raise SpecError(
                f"target {self.target!r} has {len(theirs):,} tokens that are not those of the novels' tokenizer; "
                "give a model that a recipe austen-... made from the same data, or none"
            )

    def _resolved(self) -> Resolved:
        return resolve(self.target)

    def more_scores(self, run: TrainingRun, model: Any, tokenizer: Any, ids: list[int]) -> dict[str, float]:
        """Agreement with the target."""
        from transformers import AutoModelForCausalLM

        if not self.target:
            return {}
        target: Any = AutoModelForCausalLM.from_pretrained(self._resolved().path, dtype=torch.bfloat16, local_files_only=True)
        return pair_scores(target.eval(), model, ids, run.tell)

    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""
        return small_llama(self, ids, vocabulary, self.layers, self.width)
