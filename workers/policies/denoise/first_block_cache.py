"""First-block cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.denoising import denoising, share_of, state_input
from workers.methods import Policy, card, knob
from workers.session import Session


@dataclass
class Kept:
    """What is known of the last computed step, and whether the running one reuses it.

    Attributes:
        change: what the first block added to its input then [B, N, D].
        tail: what all later blocks added: to the picture's states, and to the text's where a block changes them.
        after: the running step's states behind the first block, in the same order.
        row: steps in a row that reused.
    """

    change: Tensor | None = None
    tail: tuple[Tensor | None, ...] = ()
    after: tuple[Tensor | None, ...] = ()
    reusing: bool = False
    row: int = 0

    def ending(self) -> tuple[Tensor | None, ...]:
        """The states behind the last block, had the later blocks added what they added then."""
        return tuple(None if a is None or r is None else a + r for a, r in zip(self.after, self.tail, strict=True))


class FirstBlockCache(Policy):
    """Run the first transformer block; if it changed little since the last computed step, reuse what the others added then.

    The indicator of TeaCache (Liu et al. 2024, arXiv:2411.19108, section 3.3: what goes in foretells how much what comes
    out will change) in the form of ParaAttention's first-block cache: the relative L1 change of the first block's
    residual, ``mean |r - r'| / mean |r'|``. Everything behind the first block counts as one residual. It is decided for
    a batch as a whole, both halves of guidance together.
    """

    card: ClassVar[Card] = card(
        id="first-block-cache",
        title="First-block cache",
        paper="arXiv:2411.19108",
        stage="denoise",
        families=("diffusion",),
        traits=("dit",),
        workloads=("generate-images",),
        owns=("denoise.reuse",),
        needs=("denoise.rows",),
        effects={"cache_hits": "up"},
        hopes={"seconds_per_image": "down"},
        neutral={"threshold": 0.0},
    )
    threshold: float = knob(
        0.1,
        ge=0.0,
        le=10.0,
        help="largest relative change of the first block at which the rest is reused; more = faster, coarser",
    )
    warmup: int = knob(1, ge=1, le=100, help="first steps that are always computed")
    max_hits: int = knob(0, ge=0, le=100, help="most steps in a row that reuse; 0 = no limit")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Reroute the blocks."""
        return nullcontext() if self.is_neutral else self._reusing(session)

    @contextmanager
    def _reusing(self, session: Session) -> Iterator[None]:
        names = session.family.parts(session.model)["layers"]
        share = share_of(session, names[1:])

        def forward(at: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = denoising(session)
            kept = state.keep(self.card.id, Kept)
            given = (state_input(args, kwargs), kwargs.get("encoder_hidden_states"))
            if at == 0:
                out = run(*args, **kwargs)
                self._decide(kept, state.step, given[0], states_of(out, given))
                if kept.reusing:
                    session.did(self.card.id)
                    session.count("cache_hits", 1)
                    state.note_reuse(share)
                return out
            last = at == len(names) - 1
            if kept.reusing:
                return as_output(kept.ending() if last else given, len(kept.after))
            out = run(*args, **kwargs)
            if last:
                kept.tail = tuple(
                    None if a is None or b is None else b - a for a, b in zip(kept.after, states_of(out, given), strict=True)
                )
            return out

        forwards: dict[str, Callable[..., Any]] = {}
        for at, name in enumerate(names):
            block: Any = session.model.get_submodule(name)
            forwards[name] = partial(forward, at, block.forward)
        with session.rerouted(forwards if len(names) > 1 else {}):
            yield

    def _decide(self, kept: Kept, step: int, given: Tensor, after: tuple[Tensor | None, ...]) -> None:
        """Whether this step reuses: the first block's residual against that of the last computed step."""
        if after[0] is None:
            raise RuntimeError("a transformer block gave no states")
        change = after[0] - given
        near = False
        if kept.change is not None and step >= self.warmup and not (self.max_hits and kept.row >= self.max_hits):
            near = bool((change - kept.change).abs().mean() <= self.threshold * kept.change.abs().mean())
        kept.reusing, kept.after, kept.row = near, after, kept.row + 1 if near else 0
        if not near:
            kept.change = change

    def why_idle(self, session: Session) -> str:
        """Why no step reused anything."""
        return f"{self.card.title}: no step changed the first block by {self.threshold} or less; raise threshold or ask for more steps"


def states_of(out: Any, given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """(the picture's states, and the text's where the block gives them too) of a block's output.

    Blocks that work on both give (text, picture), as those of Stable Diffusion 3 and Flux do.
    """
    if isinstance(out, Tensor):
        return (out,)
    text, picture = out
    return picture, text


def as_output(states: tuple[Tensor | None, ...], count: int) -> Any:
    """States in the form in which a block gives them; ``count`` = 1 for blocks that give the picture's alone."""
    return states[0] if count == 1 else (states[1], states[0])
