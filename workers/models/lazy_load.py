"""Compressed loading: every weight is read, replaced and forgotten before the next one is read.

The model is made on the ``meta`` device (no memory). Policies that alter weights turn each linear map
into its replacement at once, so at any moment there is one unpacked matrix beside the packed ones, and a
model that fits only compressed can still run. Experts are read one by one as well. It holds no originals:
it has no baseline on this device. Policies that look at inputs or at the whole model cannot work here
(:func:`workers.plan.needs_whole_model` says so before anything is loaded).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig

from studio_state.errors import ModelError
from workers.mechanisms.expert_linears import ExpertLinears, expert_map
from workers.mechanisms.linear import Replacement
from workers.mechanisms.weight_places import Places, find_places
from workers.mechanisms.weight_policy import Spot, WeightPolicy, build
from workers.models.alignment import align
from workers.models.checkpoint import Checkpoint
from workers.models.load import library_class_of
from workers.models.talk import Progress, quiet_library, silent

if TYPE_CHECKING:
    from workers.families.base import Family
    from workers.models.resolve import Resolved


class Compressed(NamedTuple):
    """A model with its replacements in place, and the names its session must know (``session.built[Places] = places``)."""

    model: Any
    places: Places


@torch.no_grad()
def load_compressed(
    resolved: Resolved,
    policies: Sequence[WeightPolicy],
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attn_implementation: str = "sdpa",
    progress: Progress = silent,
) -> Compressed:
    """Load a model with the policies' replacements in the place of its linear maps.

    Args:
        policies: those of one lane that alter weights, in the order in which they act.
        dtype: of what no policy replaces, and of what the policies are given.

    Raises:
        ModelError: a GGUF file, missing or misshapen weights.
        SpecError: a weight that a policy cannot take.
    """
    if resolved.gguf_file:
        raise ModelError(f"{resolved.name} is a GGUF file, which is read as a whole; loading compressed needs safetensors")
    with quiet_library(), torch.device("meta"):
        model = library_class_of(resolved, family.id).from_config(
            resolved.config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=resolved.trust_remote_code
        )
    spots = find_places(family, model)
    _make_buffers(model, device)
    with Checkpoint(resolved.name, resolved.path, model, dtype, device) as files:
        names = [*spots.linears, *spots.experts, *([spots.head] if spots.head else [])]
        for i, name in enumerate(names):
            progress("load", i / len(names), f"compressing {name}")
            (_replace_experts if name in spots.experts else _replace)(model, files, policies, spots, name)
        _load_rest(model, files, spots)
    align(model)
    if (resolved.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(resolved.path, local_files_only=True)
    return Compressed(model.requires_grad_(False).eval(), spots)


def _make_buffers(model: Any, device: torch.device | str) -> None:
    """Compute the buffers that no file holds (rotary frequencies) by the library's own initialisation; weights stay on meta."""
    for module in model.modules():
        empty = {n: b for n, b in module.named_buffers(recurse=False) if b is not None and b.is_meta}
        for name, buffer in empty.items():
            module._buffers[name] = torch.empty_like(buffer, device=device)
        if empty:
            model._init_weights(module)


def _replace(model: Any, files: Checkpoint, policies: Sequence[WeightPolicy], spots: Places, name: str) -> None:
    """Read one linear map and put what the policies make of it into the model; leave it on meta if they make nothing."""
    own = model.get_submodule(name)
    stored = spots.embedding if name == spots.head and spots.embedding and f"{name}.weight" not in files else name
    source: Any = copy.copy(own)
    source._parameters = dict(own._parameters)
    source.weight = nn.Parameter(files.read(f"{stored}.weight", own.weight), requires_grad=False)
    if own.bias is not None:
        source.bias = nn.Parameter(files.read(f"{name}.bias", own.bias), requires_grad=False)
    source = _through(policies, source, Spot(name, name == spots.head))
    if not isinstance(source, Replacement):
        return
    model.set_submodule(name, source)
    lookup = source.lookup(files.dtype) if name == spots.head and spots.embedding else None
    if lookup is not None:
        model.set_submodule(str(spots.embedding), lookup)


def _through(policies: Sequence[WeightPolicy], source: Any, spot: Spot) -> Any:
    """What the policies make of one linear map, one after the other; the map itself if none of them replaces it."""
    for policy in policies:
        new = build(policy, source, spot) if policy.takes(spot.name) else None
        if isinstance(new, Replacement):
            new.made_by = (*getattr(source, "made_by", ()), policy)
            source = new
    return source


def _replace_experts(model: Any, files: Checkpoint, policies: Sequence[WeightPolicy], spots: Places, name: str) -> None:
    """Read the linear maps of a layer's experts one by one; left on meta, as the library has them, if no policy takes any."""
    library: Any = model.get_submodule(name)
    empty = ExpertLinears.of(library)
    if not any(p.takes(f"{name}.{one}") for p in policies for one in empty.names()):
        return
    new: dict[str, nn.Module] = {}
    for one in empty.names():
        part, _, number = one.rpartition(".")
        whole = getattr(library, part)
        source = expert_map(files.read_expert(f"{name}.{part}", whole, int(number)))
        new[one] = _through(policies, source, Spot(f"{name}.{one}"))
    model.set_submodule(name, empty.with_maps(new))


def _load_rest(model: Any, files: Checkpoint, spots: Places) -> None:
    """Read every parameter that is still on meta, and the buffers that files keep; a head that was left alone is tied again."""
    head = model.get_submodule(spots.head) if spots.head else None
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        path, _, leaf = name.rpartition(".")
        value = nn.Parameter(files.read(name, parameter), requires_grad=False)
        setattr(model.get_submodule(path), leaf, value)
        if path == spots.embedding and isinstance(head, nn.Linear):
            head.weight = value
    for path, module in model.named_modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            key = f"{path}.{leaf}" if path else leaf
            if leaf not in module._non_persistent_buffers_set and key in files:
                module._buffers[leaf] = files.read(key, buffer)
