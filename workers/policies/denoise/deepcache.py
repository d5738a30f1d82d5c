"""DeepCache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.mechanisms.denoise_reuse import Form, begun, form_of, hollow, note_hit, running
from workers.mechanisms.denoising import denoising, share_of, state_input
from workers.methods import Policy, card, knob
from workers.session import Session


@dataclass
class Kept:
    """What the last full step left.

    Attributes:
        deep: what the last inner block gave: the feature that enters the outer blocks of the up path [B, C, h, w].
        forms: inner block -> form of what it gave.
        shape: of what the first inner block was given.
        whole: the running step is a full one.
    """

    deep: Any = None
    forms: dict[int, Form] = field(default_factory=dict)
    shape: torch.Size | None = None
    whole: bool = True


class DeepCache(Policy):
    """Run the whole U-Net at every few steps only; between, take its inner blocks' outcome from the last full step.

    Ma et al. 2023, arXiv:2312.00858, section 3.3: what the up path gets from below changes slowly from step to step, so
    the outer blocks run with fresh skip connections and an older deep feature. Deviations: whole blocks are left out,
    where the paper cuts between the layers of a block, and full steps are spaced evenly (the paper's uniform 1:N).
    Steps are counted alike for all pictures of a batch. The share of a step that is reused is told in weights; the outer
    blocks have few of these but work on the most pixels, so that less time is saved than that.
    """

    card: ClassVar[Card] = card(
        id="deepcache",
        title="DeepCache",
        paper="arXiv:2312.00858",
        stage="denoise",
        families=("diffusion",),
        traits=("unet",),
        workloads=("generate-images",),
        owns=("denoise.reuse",),
        needs=("denoise.rows",),
        effects={"cache_hits": "up"},
        hopes={"seconds_per_image": "down"},
        neutral={"interval": 1},
    )
    interval: int = knob(3, ge=1, le=50, help="every so many steps the whole U-Net runs; more = faster, coarser")
    branch: int = knob(
        0,
        ge=0,
        le=16,
        fits="layers",
        help="blocks from the outside in that run at every step, beside the first; more = slower, finer",
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Reroute the inner blocks.

        Raises:
            SpecError: the U-Net has fewer blocks.
        """
        return nullcontext() if self.is_neutral else self._reusing(session)

    @contextmanager
    def _reusing(self, session: Session) -> Iterator[None]:
        model: Any = session.model
        net, name = model.denoiser, model.denoiser_name
        count = len(net.down_blocks)
        if self.branch >= count or (self.branch == count - 1 and net.mid_block is None):
            raise SpecError(
                f"{self.card.id}: branch = {self.branch}, but the U-Net of {session.info.name} has {count} blocks a side; "
                f"choose 0 to {count - 1 - (net.mid_block is None)}"
            )
        down = [f"{name}.down_blocks.{i}" for i in range(self.branch + 1, count)]
        up = [f"{name}.up_blocks.{i}" for i in range(count - 1 - self.branch)]
        middle = [f"{name}.mid_block"] if net.mid_block is not None else []
        inner = [*down, *middle, *up]  # in the order in which they run; what the last gives is kept
        share = share_of(session, inner)

        def forward(at: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            state, passed = denoising(session), state_input(args, kwargs)
            kept = (running if at else begun)(state, self.card.id, Kept)
            last = at == len(inner) - 1
            if at == 0:
                kept.whole = state.step % self.interval == 0 or kept.shape != passed.shape
                kept.shape = passed.shape
            if kept.whole:
                out = run(*args, **kwargs)
                kept.forms[at] = form_of(out)
                kept.deep = out if last else None
                return out
            if last:
                note_hit(session, self.card.id, share)
                return kept.deep
            return hollow(kept.forms[at], passed)

        forwards: dict[str, Callable[..., Any]] = {}
        for at, path in enumerate(inner):
            block: Any = session.model.get_submodule(path)
            forwards[path] = partial(forward, at, block.forward)
        with session.rerouted(forwards):
            yield

    def why_idle(self, session: Session) -> str:
        """Why no step reused anything."""
        return (
            f"{self.card.title}: with interval = {self.interval} every step of so short a run is a full one; ask for more steps"
        )
