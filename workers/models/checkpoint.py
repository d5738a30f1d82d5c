"""The tensors of a folder's safetensors files under the names that a model has for them, read one at a time as they are asked for.

Files may name weights otherwise than the library does today, and hold in pieces what a model holds as one (experts, one by one).
The library's own rules for that are applied here, so whatever it loads can be read tensor by tensor.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, dot_natural_key, rename_source_key

from studio_state.errors import ModelError
from workers.models import weights_files
from workers.models.talk import first_line


class Checkpoint:
    """A folder's weights.

    Args:
        name: what the user asked for, for sentences.
        model: the empty one that is to be filled; its names are those that are asked for.
        dtype, device: of what is read.

    Raises:
        ModelError: no weights, or a damaged file.
    """

    def __init__(self, name: str, folder: Path, model: Any, dtype: torch.dtype, device: torch.device | str):
        self.name, self.model, self.dtype, self.device = name, model, dtype, device
        self._stack, self._file_of = ExitStack(), {}  # type: ExitStack, dict[str, Any]
        try:
            for path in weights_files.files(name, folder):
                weights_files.read_header(path)
                file = self._stack.enter_context(safe_open(path, framework="pt"))
                self._file_of.update(dict.fromkeys(file.keys(), file))
        except SafetensorError as e:
            self._stack.close()
            raise ModelError(f"{name} has a damaged weights file ({first_line(e)}); copy or download it again") from e
        self._pieces: dict[str, dict[str, list[str]]] = {}  # name in the model -> pattern -> keys in the files
        self._rule: dict[str, Any] = {}  # name in the model -> how pieces become one
        self._find()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def _find(self) -> None:
        """Where each of the model's tensors is."""
        rules = get_model_conversion_mapping(self.model)
        converters = [r for r in rules if isinstance(r, WeightConverter)]
        renamings = [r for r in rules if not isinstance(r, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        names, prefix = self.model.state_dict(), self.model.base_model_prefix
        for key in sorted(self._file_of, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, names)
            if target not in names:
                target, pattern = rename_source_key(key, [], [], prefix, names)
            self._pieces.setdefault(target, {}).setdefault(pattern or "", []).append(key)
            if pattern is not None:
                self._rule[target] = by_pattern[pattern]

    def read(self, key: str, like: Tensor) -> Tensor:
        """One tensor in the dtype and on the device of this load.

        Raises:
            ModelError: missing, or of another shape than the config says.
        """
        pieces = self._pieces_of(key)
        tensors = {pattern: [self._file_of[k].get_tensor(k) for k in keys] for pattern, keys in pieces.items()}
        return self._checked(key, self._made(key, tensors), like.shape)

    def read_expert(self, key: str, like: Tensor, number: int) -> Tensor:
        """One expert of a tensor whose first dimension they are; the others are not read, where the library's rules allow that.

        Raises:
            ModelError: missing, or of another shape than the config says.
        """
        pieces, rule = self._pieces_of(key), self._rule.get(key)
        if rule is None:
            (source,) = pieces[""]
            return self._checked(key, self._file_of[source].get_slice(source)[number], like.shape[1:])
        first = rule.operations[0]
        if not isinstance(first, MergeModulelist) or first.dim != 0 or any(len(k) != len(like) for k in pieces.values()):
            return self.read(key, like)[number].clone()
        own = {pattern: [self._file_of[keys[number]].get_tensor(keys[number])] for pattern, keys in pieces.items()}
        return self._checked(key, self._made(key, own)[0], like.shape[1:])

    def _pieces_of(self, key: str) -> dict[str, list[str]]:
        if key not in self._pieces:
            raise ModelError(
                f"the files of {self.name} lack the weight {key}, or name it otherwise than the library; it cannot be loaded compressed"
            )
        return self._pieces[key]

    def _made(self, key: str, tensors: dict[str, list[Tensor]]) -> Tensor:
        """One tensor of its pieces, by the library's rule."""
        rule = self._rule.get(key)
        if rule is None:
            return tensors[""][0]
        rule = copy.deepcopy(rule)
        rule.collected_tensors = tensors
        made = rule.convert(key, model=self.model, config=self.model.config).get(key)
        if made is None:
            raise ModelError(
                f"{self.name}: the library makes several weights of the pieces of {key}; it cannot be loaded compressed"
            )
        tensor: Tensor = made[0] if isinstance(made, list) else made
        return tensor

    def _checked(self, key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
        if tensor.shape != shape:
            raise ModelError(
                f"{key} of {self.name} has the shape {tuple(tensor.shape)}, its config says {tuple(shape)}; take the model's own config"
            )
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)
