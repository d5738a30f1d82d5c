"""What every bench is told: model, threads, how many pairs, how many tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Sizes of the benches.

    Attributes:
        pairs: interleaved repetitions of each comparison.
        prompt_tokens, new_tokens: of one run.
        rounds: how often the A/A test is repeated.
    """

    model: str
    threads: int
    pairs: int = 9
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 20

    def quick(self) -> Plan:
        """Three pairs of short runs."""
        return Plan(self.model, self.threads, pairs=3, prompt_tokens=32, new_tokens=24, rounds=4)
