"""Names of the parts of a model, found by what they are, not by which model it is."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

ATTENTIONS = ("self_attn", "attention", "attn")
MIXERS = (*ATTENTIONS, "mixer", "mamba", "linear_attn")  # how a layer mixes positions: by attention or by a running state
TOWERS = ("vision_tower", "vision_model", "visual")
PROJECTORS = ("multi_modal_projector", "connector")
DECODERS = ("language_model", "text_model")


def language_parts(model: Any, inside: nn.Module) -> dict[str, list[str]]:
    """Names of the decoder layers under one module of a model, their attentions and linear maps, and of the output head."""
    names = dict(model.named_modules())
    under = {id(m) for m in inside.modules()}
    lists = [
        n
        for n, m in names.items()
        if isinstance(m, nn.ModuleList) and id(m) in under and any(hasattr(layer, mixer) for layer in m for mixer in MIXERS)
    ]
    prefix = min(lists, key=len) if lists else ""
    layers = [f"{prefix}.{i}" for i in range(len(names[prefix]))] if lists else []
    linears = [n for n, m in names.items() if isinstance(m, nn.Linear | Conv1D) and lists and n.startswith(prefix + ".")]
    head = [n for n, m in names.items() if isinstance(m, nn.Linear) and m is model.get_output_embeddings()]
    attending = [f"{n}.{attention_name(names[n])}" for n in layers if attention_name(names[n])]
    return {"layers": layers, "attentions": attending, "linears": linears, "head": head}


def vision_parts(model: nn.Module, encoder: nn.Module) -> dict[str, list[str]]:
    """Names of the layers of a vision encoder, their attentions and linear maps."""
    names = {id(m): n for n, m in model.named_modules()}
    layers: list[nn.Module] = []
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) and attention_name(module[0]) and len(module) >= len(layers):
            layers = list(module)
    linears = [names[id(m)] for m in encoder.modules() if isinstance(m, nn.Linear)]
    return {
        "vision_layers": [names[id(m)] for m in layers],
        "vision_attentions": [f"{names[id(m)]}.{attention_name(m)}" for m in layers],
        "vision_linears": linears,
    }


def attention_name(layer: nn.Module) -> str:
    """Under which name a layer keeps its attention; empty if it has none."""
    return next((a for a in ATTENTIONS if isinstance(getattr(layer, a, None), nn.Module)), "")


def child(model: Any, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these that a model has."""
    return next((getattr(model, n) for n in names if isinstance(getattr(model, n, None), nn.Module)), None)
