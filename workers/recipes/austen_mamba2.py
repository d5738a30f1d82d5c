"""A state-space language model of Jane Austen's novels: no attention, no cache that grows."""

from __future__ import annotations

from typing import Any, ClassVar

from studio_state.catalog import Card
from workers.methods import card, knob
from workers.training.novel_recipe import Ids, NovelRecipe

HEAD, EXPAND, CHUNK = 32, 2, 64


class AustenMamba2(NovelRecipe):
    """Train a small Mamba-2 on Jane Austen's novels.

    Dao & Gu 2024, arXiv:2405.21060. Trains in chunks of 64 tokens (section 6), which the library computes
    with plain matrix products; a Mamba-1 goes token by token there, and trains more than forty times slower on a CPU.
    """

    card: ClassVar[Card] = card(
        id="austen-mamba2", title="Mamba-2 on Jane Austen", kind="recipe", families=("llm",), paper="arXiv:2405.21060"
    )

    layers: int = knob(4, ge=1, le=48, help="Mamba-2 layers; more = slower and better")
    width: int = knob(128, ge=32, le=1024, multiple_of=32, help="hidden size; more = slower and better")
    state: int = knob(32, ge=4, le=256, help="state of a channel; more = remembers more, slower")

    def model(self, ids: Ids, vocabulary: int) -> Any:
        """The untrained network."""
        from transformers import Mamba2Config, Mamba2ForCausalLM

        config = Mamba2Config(
            vocab_size=vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            state_size=self.state,
            expand=EXPAND,
            head_dim=HEAD,
            num_heads=EXPAND * self.width // HEAD,
            n_groups=1,
            chunk_size=CHUNK,
            tie_word_embeddings=True,
            **ids._asdict(),
        )
        return Mamba2ForCausalLM(config)
