"""What a model is, from its config and the headers of its files: family, traits, sizes. No weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from studio_state.errors import Unavailable
from studio_state.experiment import ModelInfo
from workers.models.diffusion_info import diffusion_facts
from workers.models.fingerprint import fingerprint
from workers.models.resolve import Resolved

LEAN_SHAPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose layer is exactly: RMSNorm, separate q, k, v, o linears, RMSNorm, separate gate, up, down linears
with SiLU, rotary positions and two plain residual additions (Qwen3 also normalises queries and keys)."""

CLS_ENCODERS = ("vit", "deit", "dinov2", "clip_vision_model")
PLAIN_ENCODERS = ("siglip_vision_model", "idefics3_vision", "smolvlm_vision")
TILING = ("idefics3", "smolvlm")

_BOTH = "hybrid"  # a layer that attends and has a running state
_SSM_LAYERS = ("mamba", "mamba2", "linear_attention", "recurrent", "conv", "ssm")
_WINDOW_LAYERS = ("sliding_attention", "chunked_attention")
_SSM_FIELDS = ("ssm_cfg", "state_size", "mamba_d_state", "ssm_state_size")
_EXPERT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # in older files, not parameters
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def model_info(resolved: Resolved) -> ModelInfo:
    """Family, traits and sizes of a model.

    Raises:
        Unavailable: it is of no family that the studio knows.
    """
    entry = resolved.entry
    facts = resolved.gguf
    common = {
        "name": resolved.name,
        "title": _title(resolved),
        "revision": resolved.revision,
        "fingerprint": "" if resolved.revision or entry else fingerprint(_weight_files(resolved)),
        "family": family(resolved),
        "architecture": architecture(resolved),
        "licence": entry.licence if entry else (facts.licence if facts else ""),
        "source": resolved.source,
        "note": entry.note if entry else (facts.note if facts else ""),
        "stored_bytes": facts.stored_bytes if facts else sum(t.bytes for t in resolved.tensors.values()),
        "dtype": _stored_dtype(resolved),
    }
    if resolved.config is None:
        seen = diffusion_facts(resolved.name, resolved.path, resolved.raw, resolved.tensors)
    else:
        config = resolved.config.get_text_config()
        seen = {**_shape(config), "parameters": _parameters(resolved), "traits": _traits(resolved, config)}
    return ModelInfo(**common | seen | _packed(resolved, seen["traits"]))


def _packed(resolved: Resolved, traits: Iterable[str]) -> dict[str, Any]:
    """What an exported model's recipe knows better than its config and files."""
    recipe = resolved.packed
    if recipe is None:
        return {}
    base = recipe.info
    return {
        "title": f"{base.title or base.name}, packed ({recipe.pipeline})",
        "packed": recipe.text(),
        "parameters": recipe.parameters,
        "dtype": recipe.dtype,
        "licence": base.licence,
        "note": base.note,
        "traits": tuple(sorted({*traits, *base.traits, "packed"})),
    }


def _weight_files(resolved: Resolved) -> Iterable[Path]:
    return [resolved.path / resolved.gguf_file] if resolved.gguf_file else resolved.path.rglob("*.safetensors")


def _title(resolved: Resolved) -> str:
    if resolved.entry:
        return resolved.entry.title
    if resolved.gguf:
        return resolved.gguf.title or resolved.gguf_file or resolved.name
    return resolved.name if resolved.revision else resolved.path.name


def architecture(resolved: Resolved) -> str:
    """Name of the class that runs the model, for example ``LlamaForCausalLM``."""
    if resolved.config is None:
        return str(resolved.raw.get("_class_name", "DiffusionPipeline"))
    named = resolved.raw.get("architectures") or []
    return (
        str(named[0])
        if named
        else auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(resolved.config.model_type, resolved.config.model_type)
    )


def family(resolved: Resolved) -> str:
    """``llm``, ``vlm``, ``diffusion`` or ``vit``.

    Raises:
        Unavailable: none of them.
    """
    if resolved.config is None:
        return "diffusion"
    name = architecture(resolved)
    config = resolved.config
    if name in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() and hasattr(config, "vision_config"):
        return "vlm"
    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "llm"
    encoders = class_names(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) | class_names(auto.MODEL_FOR_IMAGE_MAPPING_NAMES)
    if name in encoders or name == "CLIPVisionModel":
        return "vit"
    if resolved.trust_remote_code and name.endswith("ForCausalLM"):
        return "llm"
    raise Unavailable(
        f"{resolved.name} is a {name} ({config.model_type}), which is none of the families the studio knows: "
        "llm (a class ...ForCausalLM), vlm, diffusion, vit; choose another model"
    )


def class_names(mapping: Any) -> set[str]:
    """Class names of a transformers mapping, whose values are names or tuples of names."""
    return {n for value in mapping.values() for n in ((value,) if isinstance(value, str) else value)}


def _shape(config: PretrainedConfig) -> dict[str, Any]:
    """Widths and layer counts."""
    hidden, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    layers = _number(config, "num_hidden_layers")
    kinds = layer_kinds(config)
    windowed = sum(k in _WINDOW_LAYERS for k in kinds)
    return {
        "layers": layers,
        "hidden": hidden,
        "ffn": _number(config, "intermediate_size", "n_inner", "ffn_dim") or (4 * hidden if config.model_type == "gpt2" else 0),
        "heads": heads,
        "kv_heads": _number(config, "num_key_value_heads") or heads,
        "head_dim": _number(config, "head_dim") or (hidden // heads if heads else 0),
        "vocab": _number(config, "vocab_size"),
        "context": _number(config, "max_position_embeddings"),
        "attention_layers": sum(k not in _SSM_LAYERS for k in kinds),
        "window": (_number(config, "sliding_window", "attention_chunk_size") if windowed else 0),
        "window_layers": windowed,
    }


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """One word a layer: ``full_attention``, ``sliding_attention``, ``mamba`` ..., as the config says or as its type implies."""
    layers = _number(config, "num_hidden_layers")
    named = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if named:
        return [str(k) for k in named]
    if any(getattr(config, f, None) for f in _SSM_FIELDS) or "mamba" in config.model_type:
        return ["mamba"] * layers
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return ["sliding_attention"] * layers
    return ["full_attention"] * layers


def _traits(resolved: Resolved, config: PretrainedConfig) -> tuple[str, ...]:
    """Words that methods ask for, sorted."""
    kinds, shape = layer_kinds(config), _shape(config)
    ssm = any(k in (*_SSM_LAYERS, _BOTH) for k in kinds)
    found = {
        "ssm": ssm,
        "hybrid": ssm and shape["attention_layers"] > 0,
        "sliding-window": shape["window_layers"] > 0,
        "moe": any((_number(config, f) or 0) > 1 for f in _EXPERT_FIELDS),
        "rope": bool(getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None))
        and getattr(config, "position_embedding_type", "rope") != "nope",
        "tied-embeddings": _tied(resolved),
        "chat-template": _has_chat_template(resolved),
        "lean-shape": config.model_type in LEAN_SHAPES and getattr(config, "hidden_act", "") == "silu",
        **_vision_traits(resolved),
        "remote-code": resolved.trust_remote_code and "auto_map" in resolved.raw,
        **({_sharing(shape): True} if shape["attention_layers"] else {}),
    }
    given: Iterable[str] = (*(resolved.entry.traits if resolved.entry else ()), *(resolved.gguf.traits if resolved.gguf else ()))
    return tuple(sorted({*(name for name, holds in found.items() if holds), *given}))


def _vision_traits(resolved: Resolved) -> dict[str, bool]:
    """What a vision encoder has: a CLS token (and DeiT's second one), layers that can be taken apart, tiles."""
    config = getattr(resolved.config, "vision_config", resolved.config)
    kind = str(getattr(config, "model_type", ""))
    return {
        "cls-token": kind in CLS_ENCODERS,
        "distillation-token": kind == "deit",
        "vision-blocks": kind in (*CLS_ENCODERS, *PLAIN_ENCODERS),
        "tiles": bool(getattr(resolved.config, "image_grid_pinpoints", None)) or resolved.raw.get("model_type") in TILING,
        "labels": "ImageClassification" in architecture(resolved),
    }


def _sharing(shape: dict[str, Any]) -> str:
    """How query heads share KV heads: ``mha`` (not), ``gqa`` (in groups), ``mqa`` (all one)."""
    if shape["kv_heads"] == shape["heads"]:
        return "mha"
    return "mqa" if shape["kv_heads"] == 1 else "gqa"


def _tied(resolved: Resolved) -> bool:
    """The output head is the input embedding (vision configs do not have the field)."""
    return bool(getattr(resolved.config, "tie_word_embeddings", False))


def _parameters(resolved: Resolved) -> int:
    """Weights of the model, tied ones once."""
    if resolved.gguf:
        return resolved.gguf.parameters
    tied = _tied(resolved) and any("embed" in k or k.endswith("wte.weight") for k in resolved.tensors)
    return sum(
        t.elements
        for key, t in resolved.tensors.items()
        if not key.endswith(_BUFFERS) and not (tied and key.endswith("lm_head.weight"))
    )


def _stored_dtype(resolved: Resolved) -> str:
    """The format that the config names, else the one of most stored weights."""
    named = str(getattr(resolved.config, "dtype", None) or "").removeprefix("torch.")
    return named if named in _DTYPES.values() else file_dtype(resolved)


def file_dtype(resolved: Resolved) -> str:
    """The format of most stored weights; float32 for those of a GGUF file, which are unpacked."""
    sizes: dict[str, int] = {}
    for t in resolved.tensors.values():
        sizes[t.dtype] = sizes.get(t.dtype, 0) + t.elements
    return _DTYPES.get(max(sizes, key=lambda k: sizes[k]), "float32") if sizes else "float32"


def _has_chat_template(resolved: Resolved) -> bool:
    if resolved.gguf:
        return resolved.gguf.chat_template
    if (resolved.path / "chat_template.jinja").is_file() or (resolved.path / "chat_template.json").is_file():
        return True
    files = (resolved.path / "tokenizer_config.json", resolved.path / "processor_config.json")
    return any(f.is_file() and '"chat_template"' in f.read_text(encoding="utf-8") for f in files)


def _number(config: PretrainedConfig, *names: str) -> int:
    """The first of these fields that is a number; 0 if none is."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0
