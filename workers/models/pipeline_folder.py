"""Folders of diffusion pipelines: what they are made of, whether they are whole, and the loaded pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from studio_state.errors import ModelError
from workers.models import weights_files
from workers.models.talk import first_line
from workers.models.weights_files import StoredTensor

INDEX = "model_index.json"
OWN = "ClassConditionalPipeline"
LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
LEAVABLE = (
    "safety_checker",
    "feature_extractor",
    "image_encoder",
    "text_encoder_3",
    "tokenizer_3",
)  # parts that pipelines run without
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")


def components(name: str, index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Part -> (library, class), as ``model_index.json`` names them; parts that are left out are not in it.

    Raises:
        ModelError: no class of pipeline, no denoiser, or a part that is Python code of the repository.
    """
    if not isinstance(index.get("_class_name"), str):
        raise ModelError(f"the {INDEX} of {name} names no pipeline class; take the model's original file")
    found: dict[str, tuple[str, str]] = {}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) for v in value):
            continue
        if value[0] not in LIBRARIES:
            raise ModelError(
                f"the part {part!r} of {name} is Python code of its own ({value[0]}.{value[1]}), which is not run; "
                "choose a pipeline whose parts are classes of diffusers and transformers"
            )
        found[part] = (value[0], value[1])
    if not {"unet", "transformer"} & found.keys():
        raise ModelError(
            f"{name} has neither a unet nor a transformer in its {INDEX}; it is no diffusion model that the studio runs"
        )
    if "scheduler" not in found:
        raise ModelError(f"{name} has no scheduler in its {INDEX}; take the model's original files")
    return found


def read_tensors(name: str, folder: Path, parts: dict[str, tuple[str, str]]) -> dict[str, StoredTensor]:
    """Headers of the weights of every part, named ``part.tensor``.

    Raises:
        ModelError: the folder of a part is missing, has no weights, only pickles, or a damaged file.
    """
    tensors: dict[str, StoredTensor] = {}
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"{name} lacks the folder{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}, which its {INDEX} names; "
            "copy or download the whole model again"
        )
    for part in parts:
        if part.startswith(WITHOUT_WEIGHTS):
            continue
        single = sorted((folder / part).glob("*.safetensors"))
        plain = [f for f in single if ".fp16." not in f.name and ".non_ema" not in f.name]
        if not plain:
            tensors |= {f"{part}.{k}": v for k, v in weights_files.read_folder(f"{name}/{part}", folder / part).items()}
        for file in plain:
            tensors |= {f"{part}.{k}": v for k, v in weights_files.read_header(file).items()}
    return tensors


def part_config(folder: Path, part: str) -> dict[str, Any]:
    """The config of one part (``scheduler_config.json`` for schedulers); empty if it has none.

    Raises:
        ModelError: it is not JSON.
    """
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise ModelError(f"{file} cannot be read as JSON ({first_line(e)}); copy or download it again") from e
    return data if isinstance(data, dict) else {}


def pipeline_class(name: str, index: dict[str, Any]) -> Any:
    """The class that runs the pipeline.

    Raises:
        ModelError: diffusers does not know it.
    """
    import diffusers

    wanted = index["_class_name"]
    if wanted == OWN:
        from workers.families.class_pipeline import ClassConditionalPipeline

        return ClassConditionalPipeline
    found = getattr(diffusers, wanted, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        raise ModelError(
            f"{name} needs the pipeline {wanted!r}, which diffusers {diffusers.__version__} does not have; choose another model"
        )
    return found


def check_scheduler(name: str, folder: Path, index: dict[str, Any], library_class: Any) -> None:
    """Refuse a scheduler that the pipeline's denoiser was not made for: it would draw noise without a word.

    Raises:
        ModelError: a class that diffusers does not have, or flow matching where the pipeline takes none, or the other way round.
    """
    import diffusers

    given = components(name, index)["scheduler"][1]
    if not hasattr(diffusers, given):
        raise ModelError(
            f"{name} names the scheduler {given!r}, which diffusers {diffusers.__version__} does not have; use the model's original files"
        )
    if library_class.__name__ == OWN:  # made for both
        return
    wanted = str(inspect.signature(library_class.__init__).parameters["scheduler"].annotation)
    config = part_config(folder, "scheduler")
    flows = (
        given.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    )
    if flows != ("FlowMatch" in wanted):
        kind, other = ("flow matching", "noise prediction") if not flows else ("noise prediction", "flow matching")
        raise ModelError(
            f"{name} pairs the pipeline {library_class.__name__}, which is made for {kind}, with {given}, a scheduler for {other}; "
            "use the scheduler of the model's original files"
        )


def load_pipeline(
    name: str, folder: Path, index: dict[str, Any], dtype: torch.dtype, device: str, made: Mapping[str, Any] | None = None
) -> Any:
    """The pipeline with its weights, all parts frozen and in eval mode, as a :class:`DiffusionModel`.

    Args:
        made: parts that are there already; they stay where they are.

    Raises:
        ModelError: a class that is not known, or parts that do not fit together.
    """
    from workers.families.diffusion_model import DiffusionModel

    library_class = pipeline_class(name, index)
    check_scheduler(name, folder, index, library_class)
    taken = set(inspect.signature(library_class.__init__).parameters)
    left_out = {p: None for p in LEAVABLE if p in taken and p not in components(name, index)}
    given = {**left_out, **(made or {})}
    pipeline = library_class.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **given)
    pipeline.set_progress_bar_config(disable=True)
    named = index.get("id2label")
    return DiffusionModel(pipeline if made else pipeline.to(device), named if isinstance(named, dict) else None)
