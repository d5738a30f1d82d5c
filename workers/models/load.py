"""Weights into memory: one model, frozen, with what prepares its inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Idefics3Processor,
    Qwen2_5_VLProcessor,
)
from transformers.models.auto import modeling_auto as auto

from studio_state.errors import ModelError, Unavailable
from studio_state.experiment import number_format
from workers.models import gguf_file
from workers.models.alignment import align
from workers.models.info import architecture, class_names, family
from workers.models.packed_load import load_packed
from workers.models.pipeline_folder import load_pipeline
from workers.models.resolve import Resolved
from workers.models.talk import first_line, quiet_library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Loaded(NamedTuple):
    """A model in eval mode without gradients, and what prepares its inputs.

    Attributes:
        tokenizer: always with a padding token; None for models that read no text.
        images: what turns images (and the text around them) into inputs; None for models that do not see.
    """

    model: Any
    tokenizer: Any
    images: Any = None


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


def load_model(resolved: Resolved, dtype: torch.dtype, device: str = "cpu", attn_implementation: str = "sdpa") -> Loaded:
    """Load a model of any family that the studio runs.

    Args:
        dtype: see :func:`torch_dtype`.
        attn_implementation: name of a registered attention function.

    Raises:
        Unavailable: a model of another family.
        ModelError: weights missing or of other shapes than the config says, no tokenizer, or not enough device memory.
    """
    kind = family(resolved)
    if kind == "diffusion":
        import diffusers  # noqa: F401  (loaded here, so that its progress bars can be switched off)
    with quiet_library():
        try:
            if resolved.packed:
                library_class = None if kind == "diffusion" else library_class_of(resolved, kind)
                model = load_packed(resolved, library_class, dtype, device, attn_implementation)
                tokenizer, images = (None, None) if kind == "diffusion" else load_inputs(resolved, kind)
            elif kind == "diffusion":
                model, tokenizer, images = load_pipeline(resolved.name, resolved.path, resolved.raw, dtype, device), None, None
            else:
                model = _weights(resolved, library_class_of(resolved, kind), dtype, attn_implementation).to(device)
                tokenizer, images = load_inputs(resolved, kind)
            if kind == "vit" and (resolved.path / "saliency_head.safetensors").is_file():
                from workers.models.saliency import load_saliency_head

                head = load_saliency_head(resolved.path)
                if head is not None:
                    model.saliency_head = head.to(device).requires_grad_(False).eval()
        except torch.OutOfMemoryError as e:
            raise ModelError(
                f"{resolved.name} does not fit into the memory of {device}; choose a smaller model or dtype, or another device"
            ) from e
        except ModelError:
            raise
        except Exception as e:  # libraries raise all kinds here; one sentence with their reason
            raise ModelError(f"{resolved.name} cannot be loaded: {first_line(e)}") from e
    model.requires_grad_(False).eval()
    align(model)
    return Loaded(model, tokenizer, images)


def library_class_of(resolved: Resolved, kind: str) -> Any:
    """The library's automatic class for a family.

    Raises:
        Unavailable: a family that the studio does not run.
    """
    if kind == "llm":
        return AutoModelForCausalLM
    if kind == "vlm":
        return AutoModelForImageTextToText
    if kind == "vit":
        named = architecture(resolved) in class_names(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
        return AutoModelForImageClassification if named else AutoModel
    raise Unavailable(
        f"{resolved.name} is of family {kind}, whose weights are not loaded as one model; choose a model of family llm, vlm or vit"
    )


def load_inputs(resolved: Resolved, kind: str) -> tuple[Any, Any]:
    """Tokenizer and image processor of a model, None where it has none.

    Raises:
        ModelError: what its family needs is not there.
    """
    if kind == "llm":
        return load_tokenizer(resolved), None
    word, loader = ("image processor", AutoImageProcessor) if kind == "vit" else ("processor", processor_class(resolved))
    files = ("preprocessor_config.json", "processor_config.json")
    if not any((resolved.path / name).is_file() for name in files):
        raise ModelError(
            f"{resolved.name} has neither {' nor '.join(files)}, which say how its images are prepared; copy them from the model's source"
        )
    try:
        images = loader.from_pretrained(resolved.path, local_files_only=True, trust_remote_code=resolved.trust_remote_code)
    except Exception as e:
        raise ModelError(
            f"{resolved.name} has no {word} that can be loaded ({first_line(e)}); copy its files from the model's source again"
        ) from e
    if kind == "vit":
        return None, images
    tokenizer = images.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, images


def processor_class(resolved: Resolved) -> Any:
    """The library's processor for a vision-language model; without the part for videos, which needs torchvision."""
    kind = resolved.config.model_type if resolved.config is not None else ""
    if kind == "smolvlm":  # lays its images out as Idefics3 does
        return Idefics3Processor
    if kind in ("qwen2_vl", "qwen2_5_vl"):
        return StillProcessor
    return AutoProcessor


class StillProcessor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen's processor for still images only."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """What it is made of."""
        return ["image_processor", "tokenizer"]


def _weights(resolved: Resolved, library_class: Any, dtype: torch.dtype, attn_implementation: str) -> Any:
    if resolved.gguf_file:
        return gguf_file.load_model(resolved.path / resolved.gguf_file, dtype, attn_implementation=attn_implementation)
    model, report = library_class.from_pretrained(
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
