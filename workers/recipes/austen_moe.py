"""A mixture of experts of Jane Austen's novels: a small language model with routers that were really trained."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.methods import card, knob
from workers.training.loop import TrainingRun
from workers.training.novel_lessons import Batch, next_token_loss
from workers.training.novel_recipe import Ids, NovelRecipe
from workers.training.novel_scores import balance_loss, routing_scores

HEAD, SHARING = 32, 2  # width of a head; heads that share keys and values


class AustenMoE(NovelRecipe):
    """Train a small mixture of experts on Jane Austen's novels.

    Shazeer et al. 2017, arXiv:1701.06538, in the blocks of Qwen3-MoE (arXiv:2505.09388): in each layer a router sends
    every token to two of eight experts. A little of the balancing loss of Fedus et al. 2021 (arXiv:2101.03961),
    layer by layer over the whole batch, keeps all experts in use and lets them differ.
    """

    card: ClassVar[Card] = card(
        id="austen-moe", title="Mixture of experts on Jane Austen", kind="recipe", families=("llm",), paper="arXiv:1701.06538"
    )

    steps: int = knob(4500, ge=1, le=1_000_000, help="optimizer steps; more = better, up to about ten passes over the text")
    layers: int = knob(4, ge=1, le=48, help="transformer layers; more = slower and better")
    width: int = knob(128, ge=64, le=1024, multiple_of=HEAD * SHARING, help="hidden size; more = slower and better")
    expert_width: int = knob(192, ge=16, le=4096, help="neurons of an expert")
    experts: int = knob(8, ge=2, le=128, help="experts of a layer; more = more weights at the same arithmetic")
    active: int = knob(2, ge=1, le=128, help="experts that read a token; more = slower and better")
    balance: float = knob(0.01, ge=0, le=1, help="weight of the balancing loss; more = evener use, less special experts")

    def check(self, tokenizer: Any) -> None:
        """No token can have more experts than there are."""
        if self.active > self.experts:
            raise SpecError(f"active = {self.active} of {self.experts} experts is not possible; give at most {self.experts}")

    def loss(self, net: Any, batch: Batch) -> Tensor:
        """The next token's, and the balancing loss."""
        with torch.autocast("cpu", torch.bfloat16):
            out = net(input_ids=batch.ids, use_cache=False, output_router_logits=True)
        return next_token_loss(out.logits, batch.labels) + self.balance * balance_loss(out.router_logits, self.active)

    def more_scores(self, run: TrainingRun, model: Any, tokenizer: Any, ids: list[int]) -> dict[str, float]:
        """How the experts share the held-out tokens."""
        return routing_scores(model, ids, self.active, run.tell)

    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        heads = self.width // HEAD
        config = Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.active * self.expert_width,  # of dense layers; there are none
            moe_intermediate_size=self.expert_width,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // SHARING,
            num_experts=self.experts,
            num_experts_per_tok=self.active,
            norm_topk_prob=True,
            router_aux_loss_coef=self.balance,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            **ids._asdict(),
        )
        return Qwen3MoeForCausalLM(config)
