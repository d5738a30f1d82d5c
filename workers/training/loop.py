"""Training something small: seeded, resumable, with progress. Shared by all recipes.

Every step draws its data from ``(seed, phase, step)`` alone, and the checkpoint holds weights,
average and optimizer, so that a run that was interrupted ends where an uninterrupted one ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from studio_state.errors import StudioError
from workers.session import Cancelled

UNFINISHED = "unfinished"  # folder beside the checkpoint to come
CHECKPOINT_SECONDS = 60.0
SAY_SECONDS = 2.0


@dataclass
class TrainingRun:
    """Where a recipe trains, and whom it tells.

    Attributes:
        out: folder of the checkpoint to come; unfinished state is kept in ``out/unfinished``.
        seed: of weights and data.
        say: tells progress: (text, share done).
        is_cancelled: asked between steps; the state is saved before the run stops.
        examples: score on about so many examples only; None = on all that there are.
        seconds: training time of all phases so far, over all resumptions.
    """

    out: Path
    seed: int = 0
    say: Callable[[str, float | None], None] = lambda text, done: None
    is_cancelled: Callable[[], bool] = lambda: False
    examples: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def rng(self, phase: str, step: int) -> np.random.Generator:
        """The random numbers of one step: the same whether or not the run was interrupted before."""
        return np.random.default_rng([self.seed, *phase.encode(), step])

    def tell(self, text: str, done: float | None = None) -> None:
        """Progress of what follows the training, for example of scoring.

        Raises:
            Cancelled: the person asked to stop; the trained state is kept.
        """
        if self.is_cancelled():
            raise Cancelled
        self.say(text, done)


@dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of one phase: linear warm-up, then a cosine to zero.

    Attributes:
        average: decay of the exponential moving average of the weights that is handed over.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.05
    clip: float = 1.0
    average: float = 0.999

    def factor(self, step: int) -> float:
        """Learning rate at a step, as a share of the highest."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return warm * 0.5 * (1 + float(np.cos(np.pi * min(1.0, step / self.steps))))


def fit(
    run: TrainingRun, phase: str, model: nn.Module, schedule: Schedule, loss_of: Callable[[nn.Module, int], Tensor]
) -> nn.Module:
    """Train in place, and return the averaged weights.

    Args:
        phase: name of this part of the recipe; its unfinished state is kept under it.
        loss_of: (model, step) -> loss; draws its data from ``run.rng(phase, step)``.

    Raises:
        Cancelled: the person asked to stop; the next call goes on from there.
        StudioError: the loss is no longer a number.
    """
    optimizer = torch.optim.AdamW(groups(model, schedule.weight_decay), lr=schedule.learning_rate, betas=(0.9, 0.98))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(schedule.average))
    path = run.out / UNFINISHED / f"{phase}.pt"
    step, before = restore(path, model, averaged, optimizer)
    began = said = saved = time.monotonic()
    shown = None
    model.train()
    while step < schedule.steps:
        if run.is_cancelled():
            keep(path, model, averaged, optimizer, step, before + time.monotonic() - began)
            raise Cancelled
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.factor(step)
        loss = loss_of(model, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        optimizer.step()
        averaged.update_parameters(model)
        value = loss.item()
        if not np.isfinite(value):
            raise StudioError(f"{phase}: the loss is not a number at step {step}; use a lower learning rate")
        shown = value if shown is None else 0.98 * shown + 0.02 * value
        step += 1
        now = time.monotonic()
        if now - said >= SAY_SECONDS or step == schedule.steps:
            said = now
            run.say(f"{phase}: step {step} of {schedule.steps}, loss {shown:.4f}", step / schedule.steps)
        if now - saved >= CHECKPOINT_SECONDS or step == schedule.steps:
            saved = now
            keep(path, model, averaged, optimizer, step, before + now - began)
    run.seconds[phase] = before + time.monotonic() - began
    result: nn.Module = averaged.module
    return result.eval()


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for the optimizer: vectors (norms, biases, single embeddings) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.squeeze().ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.squeeze().ndim < 2], "weight_decay": 0.0},
    ]


def keep(path: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    """Write the unfinished state; a torn write leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def restore(path: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Take up the unfinished state; (steps done, seconds spent), zeros if there is none.

    Raises:
        StudioError: the file is damaged.
    """
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as e:
        raise StudioError(f"{path} is damaged; delete it to train this part again") from e
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])
