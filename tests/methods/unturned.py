"""Oracles for what happens before rotary embedding: the library's own projections, and rotations written out in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tests.methods.driving import library_model


def library_states(folder: Path, ids: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Per layer of the library's own model: queries ``q`` and keys ``k`` before rotary embedding [heads, L, D], and what it
    caches: ``key`` and ``value``."""
    model, found = library_model(folder, "eager"), []
    handles, width = [], model.config.head_dim
    for layer in model.model.layers:
        states: dict[str, np.ndarray] = {}
        found.append(states)
        for name in ("q", "k"):
            last = getattr(layer.self_attn, f"{name}_norm", None) or getattr(layer.self_attn, f"{name}_proj")

            def keep(module: Any, args: Any, output: torch.Tensor, name: str = name, states: Any = states) -> None:
                flat = output[0].double().numpy()
                states[name] = (flat if flat.shape[-1] == width else flat.reshape(len(ids), -1, width)).swapaxes(0, 1)
                if states[name].shape[1] != len(ids):  # a norm by heads, behind the transposition
                    states[name] = states[name].swapaxes(0, 1)

            handles.append(last.register_forward_hook(keep))
    cache = DynamicCache()
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([list(ids)]), past_key_values=cache)
    finally:
        for handle in handles:
            handle.remove()
    for states, layer in zip(found, cache.layers, strict=True):
        states["key"], states["value"] = layer.keys[0].double().numpy(), layer.values[0].double().numpy()
    return found


def rotation(position: float, width: int, base: float = 10000.0) -> np.ndarray:
    """The matrix [D, D] that turns a query or key at this position, pair by pair: numbers i and i + D / 2."""
    matrix, half = np.zeros((width, width)), width // 2
    for i in range(half):
        angle = position * base ** (-2 * i / width)
        matrix[i, i] = matrix[i + half, i + half] = np.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix
