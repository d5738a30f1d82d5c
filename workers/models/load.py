"""Weights into memory: one language model, frozen, with its tokenizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio_state.errors import ModelError, Unavailable
from studio_state.experiment import number_format
from workers.models import gguf_file
from workers.models.info import family
from workers.models.resolve import Resolved
from workers.models.talk import first_line, quiet_library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model in eval mode without gradients, and its tokenizer (which always has a padding token)."""

    model: Any
    tokenizer: Any


def torch_dtype(dtype: str, stored: str, device: str) -> torch.dtype:
    """The number format of the weights.

    Args:
        dtype: ``auto`` = float32 on the CPU, ``stored`` elsewhere.
        stored: the format that the model's config names.

    Raises:
        ModelError: an unknown name.
    """
    name = number_format(dtype, stored, device)
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not allowed; allowed: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_llm(resolved: Resolved, dtype: torch.dtype, device: str = "cpu", attn_implementation: str = "sdpa") -> Loaded:
    """Load a language model.

    Args:
        dtype: see :func:`torch_dtype`.
        attn_implementation: name of a registered attention function.

    Raises:
        Unavailable: a model of another family.
        ModelError: weights missing or of other shapes than the config says, no tokenizer, or not enough device memory.
    """
    kind = family(resolved)
    if kind != "llm":
        raise Unavailable(
            f"{resolved.name} is of family {kind}; this version of the studio runs llm models only, choose one of those"
        )
    with quiet_library():
        try:
            model = _weights(resolved, dtype, attn_implementation).to(device)
            tokenizer = load_tokenizer(resolved)
        except torch.OutOfMemoryError as e:
            raise ModelError(
                f"{resolved.name} does not fit into the memory of {device}; choose a smaller model or dtype, or another device"
            ) from e
        except ModelError:
            raise
        except Exception as e:  # libraries raise all kinds here; one sentence with their reason
            raise ModelError(f"{resolved.name} cannot be loaded: {first_line(e)}") from e
    return Loaded(model.requires_grad_(False).eval(), tokenizer)


def _weights(resolved: Resolved, dtype: torch.dtype, attn_implementation: str) -> Any:
    if resolved.gguf_file:
        return gguf_file.load_model(resolved.path / resolved.gguf_file, dtype, attn_implementation=attn_implementation)
    model, report = AutoModelForCausalLM.from_pretrained(
        resolved.path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=resolved.trust_remote_code,
        output_loading_info=True,
    )
    _check_complete(resolved.name, report)
    return model


def _check_complete(name: str, report: dict[str, Any]) -> None:
    """The library fills missing weights with random numbers; here that is an error."""
    for kind, words in (("missing_keys", "lack"), ("mismatched_keys", "have another shape than the config says for")):
        keys = sorted(str(k[0] if isinstance(k, tuple) else k) for k in report.get(kind) or ())
        if keys:
            raise ModelError(
                f"the files of {name} {words} {len(keys)} of its weights (first: {keys[0]}); copy or download the model again"
            )


def load_tokenizer(resolved: Resolved) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if resolved.gguf_file:
        tokenizer = gguf_file.load_tokenizer(resolved.path / resolved.gguf_file)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                resolved.path, local_files_only=True, trust_remote_code=resolved.trust_remote_code
            )
        except Exception as e:
            raise ModelError(
                f"{resolved.name} has no tokenizer that can be loaded ({first_line(e)}); "
                "put tokenizer.json and tokenizer_config.json into its folder"
            ) from e
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
