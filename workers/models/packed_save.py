"""A model with replaced modules as a folder: its own configs, one weights file, the recipe, a model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from studio_state.errors import ModelError
from studio_state.experiment import ModelInfo
from studio_state.zoo import MANIFEST
from workers.mechanisms.linear import Storable, held_bytes, tensor_bytes
from workers.mechanisms.weight_ledger import outermost, weight_ledger
from workers.models.packed_modules import Writer, storables
from workers.models.packed_recipe import RECIPE, Bytes, PackedRecipe
from workers.models.saliency import HEAD_FILE

if TYPE_CHECKING:
    from workers.models.resolve import Resolved

WEIGHTS = "model.safetensors"
CARD = "README.md"
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".py")
NOT_COPIED = ("training.json", MANIFEST)
APART = "saliency_head"  # a part of the loaded model whose weights lie in a file of their own
_LENGTH_BYTES = 8


def save_packed(
    folder: Path,
    resolved: Resolved,
    model: nn.Module,
    tokenizer: Any,
    bare: set[int],
    base_bytes: int,
    facts: Mapping[str, Any],
) -> PackedRecipe:
    """Fill an empty folder with a model whose policies are attached.

    Args:
        resolved: the base.
        bare: ids of the modules that it was made of before any policy came.
        base_bytes: its weights in the number format of this export.
        facts: fields of the recipe that are known elsewhere: ``info``, ``pipeline``, ``dtype``, ``dtypes``, ``devices``, ``versions``.

    Raises:
        ModelError: a module that cannot be stored.
    """
    writer = Writer()
    modules = {path: writer.write(path, m) for path, m in storables(model)}
    experts, tied = _rest(model, writer, bare)
    _copy_files(resolved, folder, tokenizer)
    save_file({key: _whole(t) for key, t in writer.tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library makes it for its owner alone
    info: ModelInfo = facts["info"]
    counts = _bytes(model, folder, base_bytes)
    recipe = PackedRecipe(
        **facts,
        parameters=min(info.parameters, _parameters(model)),
        bytes=counts,
        complaint=counts.complaint(),
        experts=experts,
        tied=tied,
        modules=modules,
    )
    (folder / RECIPE).write_text(recipe.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(recipe), encoding="utf-8")
    return recipe


def _rest(model: nn.Module, writer: Writer, bare: set[int]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Give the writer everything that no policy replaced; returns the experts that stayed, and what is tied to what.

    Raises:
        ModelError: a module that some policy put there in a form that has no recipe.
    """
    inside = {id(m) for _, s in storables(model) for m in s.modules()}
    experts: dict[str, list[int]] = {}
    tied: dict[str, str] = {}
    for path, module in model.named_modules():
        if id(module) in inside or path.split(".")[0] == APART:
            continue
        if id(module) not in bare and (stay := _stayed(model, path)) is not None:
            experts[path] = stay
        elif id(module) not in bare and not any(path.startswith(f"{e}.") for e in experts):
            raise ModelError(
                f"a policy put a {type(module).__name__} in the place of {path}, for which an exported model has no form"
            )
        held = {**dict(module.named_parameters(recurse=False)), **_persistent(module)}
        for leaf, tensor in held.items():
            key = f"{path}.{leaf}" if path else leaf
            found = writer.keep(key, tensor.detach())
            if found != key:
                tied[key] = found
    return experts, tied


def _stayed(model: nn.Module, path: str) -> list[int] | None:
    """The experts that are left in a router or a mixture; None if the module is neither."""
    parent, _, name = path.rpartition(".")
    router = model.get_submodule(f"{parent}.gate") if name in ("gate", "experts") else None
    stay: list[int] | None = getattr(router, "originals", None)
    return stay


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    return {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}


def _whole(tensor: Tensor) -> Tensor:
    """What the file takes: contiguous, and nothing beside it in its storage."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() else tensor.clone()


def _parameters(model: nn.Module) -> int:
    """Weights and biases, packed or not."""
    replaced = outermost([model])
    inside = {id(m) for r in replaced for m in r.modules()}
    packed = sum(r.in_features * r.out_features + (0 if r.bias is None else r.bias.numel()) for r in replaced)
    rest = {id(p): p.numel() for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    return packed + sum(rest.values())


def _bytes(model: nn.Module, folder: Path, base_bytes: int) -> Bytes:
    """The byte table, from the model as it stands and the files as they lie there."""
    books = weight_ledger([model])
    if books is None:
        theoretical, scales, padding, held = float(held_bytes([model])), 0, 0, held_bytes([model])
    else:
        theoretical, scales, padding, held = books
    computed = [b for m in model.modules() for n, b in m.named_buffers(recurse=False) if n in m._non_persistent_buffers_set]
    files = [f for f in (folder / WEIGHTS, folder / HEAD_FILE) if f.is_file()]
    return Bytes(
        base=base_bytes,
        theoretical=round(theoretical),
        scales=scales,
        padding=padding,
        in_memory=held,
        computed=tensor_bytes(computed) + sum(s.computed_bytes() for s in _every_storable(model)),
        on_disk=sum(f.stat().st_size for f in files),
        header=sum(map(header_bytes, files)),
    )


def _every_storable(model: nn.Module) -> list[Storable]:
    return [m for m in model.modules() if isinstance(m, Storable)]


def header_bytes(file: Path) -> int:
    """Bytes of a safetensors file before its first tensor."""
    with file.open("rb") as f:
        return _LENGTH_BYTES + int.from_bytes(f.read(_LENGTH_BYTES), "little")


def _copy_files(resolved: Resolved, folder: Path, tokenizer: Any) -> None:
    """Everything of the base but its weights and its card; models that lie in folders of their own inside it come along whole."""
    if resolved.gguf_file:
        resolved.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    pipeline = resolved.config is None
    for file in sorted(resolved.path.rglob("*")):
        inner = file.relative_to(resolved.path)
        if not file.is_file() or any(part.startswith(".") for part in inner.parts):
            continue
        beside = len(inner.parts) > 1 and not pipeline
        wanted = file.suffix in COPIED or file.name.upper().startswith("LICENSE") or inner.name == HEAD_FILE
        if beside and not (resolved.path / inner.parts[0] / "config.json").is_file():
            continue
        if beside or (wanted and inner.name not in NOT_COPIED and not file.name.endswith(".index.json")):
            (folder / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / inner)


def card(recipe: PackedRecipe) -> str:
    """The model card."""
    b, info = recipe.bytes, recipe.info
    title = info.title or info.name
    rows = [(f"the base in {recipe.dtype}", b.base), ("by their bits", b.theoretical), ("scales and tables", b.scales), ("padding", b.padding), ("in memory", b.in_memory), ("on disk", b.on_disk)]  # fmt: skip
    table = "\n".join(f"| {name} | {n:,} |" for name, n in rows)
    versions = ", ".join(f"{name} {v}" for name, v in recipe.versions.items())
    licence = f"license: {info.licence.lower()}\n" if info.licence else ""
    origin = f" ({info.source}{f', revision {info.revision}' if info.revision else ''})" if info.source else ""
    note = f"\n* **About the base:** {info.note}" if info.note else ""
    return f"""---
{licence}library_name: pareto-studio
tags:
- pareto-studio
- compressed
---
# {title}, packed

Made of {title}{origin} by Pareto Studio with the pipeline

    {recipe.pipeline}

* **To run it:** `pareto-studio run --model DIR --workload WORKLOAD`. Its baseline is the packed model. Other programs do not
  know the packed form of the weights in `{WEIGHTS}`; `{RECIPE}` says what each tensor is.
* **What is not packed** is stored in {recipe.dtype}.
* **Versions:** {versions}{note}

| weights | bytes |
|---|---|
{table}
"""
