"""A language model of Jane Austen's novels with both kinds of layer: Mamba-2 and attention."""

from __future__ import annotations

from typing import Any, ClassVar

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.methods import card, knob
from workers.training.novel_recipe import Ids, NovelRecipe

HEAD, SHARING = 32, 2  # width of a head; heads that share keys and values
EXPAND, CHUNK = 2, 64


class AustenHybrid(NovelRecipe):
    """Train a small hybrid of Mamba-2 and attention on Jane Austen's novels.

    Waleffe et al. 2024, arXiv:2406.07887, as GraniteMoeHybrid without experts: every third layer attends, without
    positions, and each layer has an MLP. Of the library's hybrids this one decodes on a CPU what it computes in one pass,
    however the text is cut, and none trains faster. Bamba counts positions from 0 again when a cached text goes on, unless it
    is told them; Zamba2 bounds its time steps in the pass but not in decoding; Falcon-H1 has attention in every layer.
    """

    card: ClassVar[Card] = card(
        id="austen-hybrid",
        title="Mamba-2 and attention on Jane Austen",
        kind="recipe",
        families=("llm",),
        paper="arXiv:2406.07887",
    )

    steps: int = knob(3000, ge=1, le=1_000_000, help="optimizer steps; more = better, up to about ten passes over the text")
    layers: int = knob(6, ge=2, le=48, help="layers of both kinds; more = slower and better")
    attention_every: int = knob(3, ge=2, le=48, help="one layer of so many, the middle one, is attention; more = smaller cache")
    width: int = knob(128, ge=64, le=1024, multiple_of=HEAD * SHARING, help="hidden size; more = slower and better")
    state: int = knob(32, ge=4, le=256, help="state of a channel; more = remembers more, slower")

    @property
    def kinds(self) -> list[str]:
        """``mamba`` or ``attention`` for each layer."""
        return ["attention" if i % self.attention_every == self.attention_every // 2 else "mamba" for i in range(self.layers)]

    def check(self, tokenizer: Any) -> None:
        """A hybrid has both kinds of layer."""
        if "attention" not in self.kinds:
            raise SpecError(
                f"attention_every = {self.attention_every} puts no attention into {self.layers} layers; give at most {self.layers}"
            )

    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""
        from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

        heads = self.width // HEAD
        config = GraniteMoeHybridConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            shared_intermediate_size=2 * self.width,
            num_hidden_layers=self.layers,
            layer_types=self.kinds,
            num_attention_heads=heads,
            num_key_value_heads=heads // SHARING,
            attention_multiplier=HEAD**-0.5,  # the library does not scale by itself here
            position_embedding_type="nope",
            num_local_experts=0,
            num_experts_per_tok=0,
            mamba_n_heads=EXPAND * self.width // HEAD,
            mamba_d_head=HEAD,
            mamba_d_state=self.state,
            mamba_expand=EXPAND,
            mamba_n_groups=1,
            mamba_chunk_size=CHUNK,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            **ids._asdict(),
        )
        return GraniteMoeHybridForCausalLM(config)
