"""What every bench is told: models, threads, how many pairs, how many tokens and denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

DRAWING_MODEL = "fashion-dit"


@dataclass(frozen=True)
class Plan:
    """Sizes of the benches.

    Attributes:
        pairs: interleaved repetitions of each comparison.
        prompt_tokens, new_tokens: of one run.
        rounds: how often the A/A test is repeated.
        drawing_model: a diffusion pipeline with a transformer, for the benches that draw.
        drawn, denoising_steps: pictures of one run, and how each is drawn.
    """

    model: str
    threads: int
    pairs: int = 9
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 20
    drawing_model: str = DRAWING_MODEL
    drawn: int = 4
    denoising_steps: int = 20

    @property
    def of_texts(self) -> str:
        """What one run of the benches of language models does."""
        return f"{self.model}, {self.prompt_tokens} prompt and {self.new_tokens} new tokens"

    @property
    def of_pictures(self) -> str:
        """What one run of the benches that draw does."""
        return f"{self.drawing_model}, {self.drawn} pictures at once in {self.denoising_steps} steps"

    def quick(self) -> Plan:
        """Three pairs of short runs."""
        return replace(self, pairs=3, prompt_tokens=32, new_tokens=24, rounds=4, denoising_steps=8)
