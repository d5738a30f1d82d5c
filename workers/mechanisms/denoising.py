"""Where a run of a diffusion pipeline stands, and what policies may ask of it.

A denoiser runs once a step (twice as large under guidance). Policies of the stage ``denoise`` hook into
its blocks; between steps they keep what they reuse here, so that nothing outlives a batch of images.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from studio_state.errors import Unavailable

if TYPE_CHECKING:
    from workers.session import Session

T = TypeVar("T")


@dataclass
class Denoising:
    """One batch of images on its way from noise.

    Attributes:
        step: the denoising step that runs, from 0.
        of: steps in all.
        guided: the denoiser gets every image twice, for classifier-free guidance.
        conditional_first: order of the two halves: conditional before unconditional.
        kept: what policies keep from step to step, by key.
        reused: per step the share of the denoiser's work that was taken from an earlier step, from 0 to 1.
    """

    of: int
    guided: bool = False
    conditional_first: bool = False
    step: int = 0
    kept: dict[Hashable, Any] = field(default_factory=dict)
    reused: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reused = self.reused or [0.0] * self.of

    def keep(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing under a key, made where there is none yet in this batch."""
        if key not in self.kept:
            self.kept[key] = make()
        kept: T = self.kept[key]
        return kept

    def note_reuse(self, share: float) -> None:
        """This step took a share of its work from an earlier one."""
        self.reused[self.step] = max(self.reused[self.step], share)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(conditional, unconditional) of what the denoiser gets or gives under guidance [2B, ...]."""
        first, second = x.chunk(2)
        return (first, second) if self.conditional_first else (second, first)

    def joined(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """The two halves in the pipeline's order [2B, ...]."""
        return torch.cat((conditional, unconditional) if self.conditional_first else (unconditional, conditional))


def denoising(session: Session) -> Denoising:
    """Where the running batch stands.

    Raises:
        Unavailable: no denoiser runs.
    """
    if session.denoising is None:
        raise Unavailable("no denoiser is running; policies of the stage denoise act on diffusion models only")
    return session.denoising


def state_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The picture's states that a block of a denoiser is given, by name or as its first argument."""
    found: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return found


def share_of(session: Session, blocks: Sequence[str]) -> float:
    """Weights of some blocks over all weights of the denoiser. Not their share of the time: outer blocks of a U-Net have few weights."""
    model: Any = session.model
    inner = sum(p.numel() for name in blocks for p in session.model.get_submodule(name).parameters())
    return float(inner / max(1, sum(p.numel() for p in model.denoiser.parameters())))
