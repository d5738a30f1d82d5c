"""Which models and layers lean decode can run: the library's own of a known shape, that nobody looks into."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import SiLUActivation

from studio_state.errors import Unavailable
from workers.mechanisms.fusing import is_hooked
from workers.models.info import LEAN_SHAPES

SOURCES = frozenset(f"transformers.models.{t}.modeling_{t}" for t in LEAN_SHAPES)


def window(attention: Any) -> int | None:
    """Sliding window of a layer: its own where it names one, else the model's (Mistral)."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    is_mistral = type(attention).__name__.startswith("Mistral")
    return getattr(attention.config, "sliding_window", None) if is_mistral else None


def is_lean(module: Any) -> bool:
    """True if a decoder layer is the library's own of a known shape, and nobody looks into its inside."""
    if not _is_own(module, "DecoderLayer"):
        return False
    attention, mlp = module.self_attn, module.mlp
    inside = [
        (attention, "Attention"),
        (mlp, "MLP"),
        (module.input_layernorm, "RMSNorm"),
        (module.post_attention_layernorm, "RMSNorm"),
    ]
    inside += [(getattr(attention, name), "RMSNorm") for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return all(_is_own(m, kind) and not is_hooked(m) for m, kind in inside) and isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation))


def _is_own(module: nn.Module, kind: str) -> bool:
    """True for an unchanged module of the library, of a class ``<Model><kind>`` of a known model type."""
    cls = type(module)
    return cls.__module__ in SOURCES and cls.__name__.endswith(kind) and "forward" not in vars(module)


def check_outside(model: Any, base: Any) -> None:
    """Refuse what a step past the library's forward would leave out.

    Raises:
        Unavailable: another model, or hooks on the model as a whole.
    """
    if type(base).__module__ not in SOURCES:
        raise Unavailable(
            f"lean-decode knows models of type {', '.join(LEAN_SHAPES)}; this one is a {type(model).__name__}; remove lean-decode"
        )
    if any(is_hooked(m) for m in (model, base, base.embed_tokens, base.norm, base.rotary_emb)):
        raise Unavailable(
            "another policy acts on the forward pass of the model as a whole, which lean-decode leaves out; remove one of the two"
        )
