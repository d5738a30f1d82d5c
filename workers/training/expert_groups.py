"""The FFN neurons of a language model in groups that are active together, and a router that foresees each group's part.

Shapes: T tokens; F neurons of an FFN; C hidden width; E experts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studio_state.errors import StudioError
from workers.models.expert_split import EXPERTS, Plan
from workers.session import Cancelled
from workers.training.loop import UNFINISHED, TrainingRun

PHASE = "group"
LEAST_NORM = 1e-9  # below it an output counts as this large: its logarithm stays finite


@torch.inference_mode()
def group_neurons(run: TrainingRun, model: Any, rows: Tensor, active: float, rounds: int, ridge: float) -> Plan:
    """Read the text once, and split each layer's FFN the moment the text comes by.

    Args:
        model: a Llama of the library, float32.
        rows: token ids [B, L].
        active: share of the neurons that count as active on a token: those with the largest part in the output.
        rounds: of the k-means, at most.
        ridge: weight of the router's squared weights, in units of the mean square of a layer input's element.

    Raises:
        Cancelled: the person asked to stop; the layers that are done are kept, and the same call goes on with the next.
        StudioError: what was kept is damaged.
    """
    kept = run.out / UNFINISHED / f"{PHASE}.pt"
    done, before = _restore(kept)
    layers, began = model.model.layers, time.monotonic()

    def hook(layer: int) -> Callable[[Any, tuple[Tensor]], None]:
        def group(mlp: Any, args: tuple[Tensor]) -> None:
            if layer < len(done):
                return
            if run.is_cancelled():
                raise Cancelled
            x = args[0].flatten(0, 1)
            done.append(split_layer(mlp, x, active, rounds, ridge, run.rng(PHASE, layer)))
            _keep(kept, done, before + time.monotonic() - began)
            run.say(f"{PHASE}: layer {layer + 1} of {len(layers)}", (layer + 1) / len(layers))

        return group

    hooks = [layer.mlp.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        model.model(input_ids=rows, use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    run.seconds[PHASE] = before + time.monotonic() - began
    return Plan(*(torch.stack(parts) for parts in zip(*done, strict=True)))


def split_layer(mlp: Any, x: Tensor, active: float, rounds: int, ridge: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One FFN: its neurons' experts uint8 [F], and a router float16 [E, C].

    Args:
        x: what the FFN reads, [T, C].
    """
    parts = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)  # [T, F]
    down = mlp.down_proj.weight
    experts = balanced_groups(co_activity(parts.abs() * down.norm(dim=0), active), EXPERTS, rounds, rng)
    sizes = torch.stack([(parts[:, experts == e] @ down[:, experts == e].T).norm(dim=1) for e in range(EXPERTS)], 1)
    return experts.to(torch.uint8), ridge_router(x, sizes.clamp_min(LEAST_NORM).log(), ridge).half()


def co_activity(sizes: Tensor, active: float) -> Tensor:
    """On which tokens each neuron is active: rows of length 1, whose products are the cosines of co-activation [F, T].

    After Pei et al. 2025 (CMoE), arXiv:2502.04416: a neuron is active where it is among the so-many largest of its token.

    Args:
        sizes: how large a neuron's part in the output is, [T, F].
    """
    count = max(1, round(active * sizes.shape[1]))
    least = sizes.topk(count, dim=1).values[:, -1:]
    return nn.functional.normalize((sizes >= least).float().T, dim=1)


def balanced_groups(rows: Tensor, groups: int, rounds: int, rng: np.random.Generator) -> Tensor:
    """K-means by cosine in which all groups are of one size: the group of each row [F].

    Args:
        rows: of length 1 (or 0), [F, T]; ``groups`` divides F.
        rounds: at most; it ends where a round moves no row.
    """
    centres = rows[_spread(rows, groups, rng)]
    found = torch.empty(0, dtype=torch.long)
    for _ in range(rounds):
        before, found = found, assign_evenly(rows @ centres.T)
        if torch.equal(found, before):
            break
        centres = nn.functional.normalize(torch.stack([rows[found == g].mean(0) for g in range(groups)]), dim=1)
    return found


def _spread(rows: Tensor, count: int, rng: np.random.Generator) -> list[int]:
    """Rows to begin with: each drawn the likelier the less it is like those before it (k-means++)."""
    chosen = [int(rng.integers(len(rows)))]
    while len(chosen) < count:
        far = (1 - (rows @ rows[chosen].T).amax(1)).clamp_min(0).double().numpy()
        far[chosen] = 0
        shares = far / far.sum() if far.sum() else np.isin(np.arange(len(rows)), chosen, invert=True) / (len(rows) - len(chosen))
        chosen.append(int(rng.choice(len(rows), p=shares)))
    return chosen


def assign_evenly(likeness: Tensor) -> Tensor:
    """Give every row to the group that it is most like and that has room, those first that have most to lose: [F].

    Args:
        likeness: [F, groups], at least two groups.
    """
    count, groups = likeness.shape
    best = likeness.topk(2, dim=1).values
    order = (best[:, 0] - best[:, 1]).argsort(descending=True, stable=True).tolist()
    liked = likeness.argsort(dim=1, descending=True, stable=True).tolist()
    room, found = [count // groups] * groups, [0] * count
    for row in order:
        found[row] = next(g for g in liked[row] if room[g])
        room[found[row]] -= 1
    return torch.tensor(found)


def ridge_router(x: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Weights [E, C] whose products with x [T, C] rank the experts of a token as the targets [T, E] do, by least squares.

    The mean of the experts is taken off, which changes no rank, and what is left is scaled to a standard deviation of 1 on x.
    """
    wide = x.double()
    square = wide.T @ wide
    square += ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    weights = torch.linalg.solve(square, wide.T @ targets.double()).T  # [E, C]
    weights = weights - weights.mean(0)
    spread = (wide @ weights.T).std()
    return (weights / spread if spread else weights).float()


def _keep(path: Path, done: Sequence[tuple[Tensor, Tensor]], seconds: float) -> None:
    """Write the layers that are done; a torn write leaves those before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"layers": [list(layer) for layer in done], "seconds": seconds}, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def _restore(path: Path) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """The layers that are done, and the seconds spent on them; nothing if there are none.

    Raises:
        StudioError: the file is damaged.
    """
    if not path.exists():
        return [], 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError) as e:
        raise StudioError(f"{path} is damaged; delete it to group the neurons again") from e
    return [(experts, router) for experts, router in state["layers"]], float(state["seconds"])
