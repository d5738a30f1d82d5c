"""First-block cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from studio_state.catalog import Card
from studio_state.errors import Unavailable
from workers.mechanisms.denoise_reuse import States, alike, as_output, begun, minus, note_hit, plus, running, states_of
from workers.mechanisms.denoising import denoising, share_of, state_input
from workers.methods import Policy, card, knob
from workers.session import Session


@dataclass
class Kept:
    """What is known of the last computed step, and whether the running one reuses it.

    Attributes:
        change: what the first block added to the picture's states then [B, N, D].
        tail: what all later blocks added.
        after: the running step's states behind the first block.
        row: steps in a row that reused.
    """

    change: Tensor | None = None
    tail: States = ()
    after: States = ()
    reusing: bool = False
    row: int = 0


class FirstBlockCache(Policy):
    """Run the first transformer block; if it changed little since the last computed step, reuse what the others added then.

    The indicator of TeaCache (Liu et al. 2024, arXiv:2411.19108, section 3.3: what goes in foretells how much what comes
    out will change) in the form of ParaAttention's first-block cache: the relative L1 change of the first block's
    residual, ``mean |r - r'| / mean |r'|``. Everything behind the first block counts as one residual. It is decided for
    a batch as a whole, both halves of guidance together; where a pipeline runs them one by one, for each.
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
        """Reroute the blocks.

        Raises:
            Unavailable: the denoiser has no row of blocks; while it draws, also where their states differ in form.
        """
        return nullcontext() if self.is_neutral else self._reusing(session)

    @contextmanager
    def _reusing(self, session: Session) -> Iterator[None]:
        names = session.family.parts(session.model)["layers"]
        if len(names) < 2:
            raise self._misfit(session, "has no row of transformer blocks that the studio knows")
        share = share_of(session, names[1:])

        def first(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state = denoising(session)
            kept = begun(state, self.card.id, Kept)
            given, out = state_input(args, kwargs), run(*args, **kwargs)
            kept.after = states_of(out)
            if kept.after[0] is None or kept.after[0].shape != given.shape:
                raise self._misfit(session, "has transformer blocks that give their states in another order")
            self._decide(kept, state.step, kept.after[0] - given)
            if kept.reusing:
                note_hit(session, self.card.id, share)
            return out

        def later(run: Callable[..., Any], last: bool, *args: Any, **kwargs: Any) -> Any:
            kept = running(denoising(session), self.card.id, Kept)
            if kept.reusing:
                return as_output(plus(kept.after, kept.tail) if last else kept.after)
            out = run(*args, **kwargs)
            if last:
                if not alike(states_of(out), kept.after):
                    raise self._misfit(session, "has transformer blocks of which the last gives other states than the first")
                kept.tail = minus(states_of(out), kept.after)
            return out

        blocks: dict[str, Any] = {name: session.model.get_submodule(name) for name in names}
        forwards: dict[str, Callable[..., Any]] = {n: partial(later, b.forward, n == names[-1]) for n, b in blocks.items()}
        forwards[names[0]] = partial(first, blocks[names[0]].forward)
        with session.rerouted(forwards):
            yield

    def _decide(self, kept: Kept, step: int, change: Tensor) -> None:
        """Whether this step reuses: the first block's residual against that of the last computed step."""
        near = False
        fresh = kept.change is None or kept.change.shape != change.shape  # a pipeline may leave guidance out at some steps
        if kept.change is not None and not fresh and step >= self.warmup and not (self.max_hits and kept.row >= self.max_hits):
            near = bool((change - kept.change).abs().mean() <= self.threshold * kept.change.abs().mean())
        kept.reusing, kept.row = near, kept.row + 1 if near else 0
        if not near:
            kept.change = change

    def _misfit(self, session: Session, why: str) -> Unavailable:
        return Unavailable(f"{self.card.title} cannot run here: the denoiser of {session.info.name} {why}; remove it")

    def why_idle(self, session: Session) -> str:
        """Why no step reused anything."""
        return (
            f"{self.card.title}: no step changed the first block by {self.threshold:g} or less; "
            "raise threshold, lower warmup or ask for more steps"
        )
