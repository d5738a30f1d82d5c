"""An exported model into memory: the base's empty shape, the replaced modules made again, everything else from the weights file.

The shape is made on the ``meta`` device (no memory); only buffers that no file keeps are computed. So what is held is the packed
model, never the base.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig

from studio_state.errors import ModelError
from workers.mechanisms.experts import cut
from workers.models import pipeline_folder, weights_files
from workers.models.packed_modules import Reader
from workers.models.packed_recipe import PackedRecipe
from workers.models.talk import first_line

if TYPE_CHECKING:
    from workers.models.resolve import Resolved


def load_packed(resolved: Resolved, library_class: Any, dtype: torch.dtype, device: str, attn_implementation: str) -> Any:
    """The model with its packed modules in place.

    Args:
        library_class: makes the base from its config; None for a diffusion pipeline.
        dtype: of what no policy replaced.

    Raises:
        ModelError: a number format or device that its modules cannot work with, or a recipe and weights that do not fit together.
    """
    recipe = resolved.packed
    if recipe is None:
        raise RuntimeError("load_packed() takes exported models only")
    _check_place(resolved.name, recipe, dtype, device)
    tensors = _read(resolved.name, resolved.path, device)
    with _shapes(dtype):
        if library_class is None:
            model = _pipeline(resolved, dtype)
        else:
            model = library_class.from_config(
                resolved.config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=resolved.trust_remote_code,
            )
    fill(resolved.name, model, recipe, tensors, dtype)
    model.to(device)
    if library_class is not None and (resolved.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(resolved.path, local_files_only=True)
    return model


def fill(name: str, model: nn.Module, recipe: PackedRecipe, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Make an empty model the packed one.

    Args:
        name: of the exported model, for sentences.
        model: the base, its parameters on ``meta``.

    Raises:
        ModelError: the recipe names a module or class that is not there, or the weights lack a tensor.
    """
    for path, stay in recipe.experts.items():
        smaller = cut(_place(name, model, path), torch.tensor(stay))
        vars(smaller).pop("originals", None)  # those that stayed are all that this model has
        model.set_submodule(path, smaller)
    reader = Reader(name, tensors, getattr(torch, recipe.dtype), dtype)
    for path, written in recipe.modules.items():
        model.set_submodule(path, reader.read(path, written, _place(name, model, path)))
    made: dict[str, Any] = {}
    inside = {id(m) for path in recipe.modules for m in model.get_submodule(path).modules()}
    for path, module in model.named_modules():
        if id(module) in inside:
            continue
        for leaf, held in [*module._parameters.items(), *module._buffers.items()]:
            if held is None or leaf in module._non_persistent_buffers_set:
                continue
            key = f"{path}.{leaf}" if path else leaf
            source = recipe.tied.get(key, key)
            if source not in made:
                tensor = reader.tensor(source, key)
                if tensor.shape != held.shape:
                    raise ModelError(
                        f"{key} of {name} has the shape {tuple(tensor.shape)}, its config says {tuple(held.shape)}; export the model again"
                    )
                made[source] = nn.Parameter(tensor, requires_grad=False) if leaf in module._parameters else tensor
            (module._parameters if leaf in module._parameters else module._buffers)[leaf] = made[source]  # type: ignore[assignment]


def _place(name: str, model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as e:
        raise ModelError(
            f"the recipe of {name} names the module {path!r}, which its model does not have; export the model again"
        ) from e


def _check_place(name: str, recipe: PackedRecipe, dtype: torch.dtype, device: str) -> None:
    given, kind = str(dtype).removeprefix("torch."), torch.device(device).type
    if recipe.dtypes and given not in recipe.dtypes:
        raise ModelError(
            f"{name} was packed by {recipe.pipeline}, which works in {' and '.join(recipe.dtypes)}; set dtype = {recipe.dtypes[0]}"
        )
    if recipe.devices and kind not in recipe.devices:
        raise ModelError(
            f"{name} was packed by {recipe.pipeline}, which runs on {' and '.join(recipe.devices)} only; this experiment is on {kind}"
        )


def _read(name: str, folder: Path, device: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in weights_files.files(name, folder):
        weights_files.read_header(file)
        try:
            with safe_open(file, framework="pt", device=device) as f:
                tensors |= {key: f.get_tensor(key).clone() for key in f.keys()}  # noqa: SIM118  # aligned as the kernels need it
        except SafetensorError as e:
            raise ModelError(f"{name} has a damaged weights file ({first_line(e)}); copy or export the model again") from e
    return tensors


@contextmanager
def _shapes(dtype: torch.dtype) -> Iterator[None]:
    """What is made inside has parameters without memory, and buffers as the library makes them in this number format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights(include_buffers=False):
            yield
    finally:
        torch.set_default_dtype(before)


def _pipeline(resolved: Resolved, dtype: torch.dtype) -> Any:
    """A diffusion pipeline of empty parts.

    Raises:
        ModelError: a class that is not known.
    """
    parts: dict[str, Any] = {}
    for part, (library, wanted) in pipeline_folder.components(resolved.name, resolved.raw).items():
        if not part.startswith(pipeline_folder.WITHOUT_WEIGHTS):
            parts[part] = _empty_part(resolved, part, library, wanted)
    return pipeline_folder.load_pipeline(resolved.name, resolved.path, resolved.raw, dtype, "", parts)


def _empty_part(resolved: Resolved, part: str, library: str, wanted: str) -> Any:
    home = importlib.import_module("diffusers.pipelines.stable_diffusion" if library == "stable_diffusion" else library)
    found: Any = getattr(home, wanted, None)
    if not inspect.isclass(found):
        raise ModelError(
            f"the part {part!r} of {resolved.name} is a {wanted}, which {library} does not have; choose another model"
        )
    if hasattr(found, "config_class") and found.config_class is not None:  # of transformers
        return found(found.config_class.from_pretrained(resolved.path / part, local_files_only=True))
    return found.from_config(found.load_config(resolved.path / part, local_files_only=True))
