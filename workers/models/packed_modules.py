"""The replaced modules of a model as plain data and named tensors, and back.

A module is written down as its class, the facts of its constructor, and the keys of its tensors in the weights file
(:class:`workers.mechanisms.linear.Storable`). A tensor or module that stands in several places is written once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from studio_state.errors import ModelError
from workers.mechanisms.linear import Replacement, Storable
from workers.models.talk import first_line

HOMES = ("workers.mechanisms.", "workers.policies.")  # where the classes of replaced modules are
_DTYPE = "number format"


class Written(BaseModel):
    """One module.

    Attributes:
        made_of: its class, ``module:Name``.
        facts: plain arguments of its constructor.
        tensors: argument -> key in the weights file.
        inside: argument -> module or list of modules.
        replaces, zeros: as on :class:`~workers.mechanisms.linear.Replacement`.
        same: path of the module before it that it is; all else is empty then.
    """

    model_config = ConfigDict(extra="forbid")
    made_of: str = ""
    facts: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, str] = Field(default_factory=dict)
    inside: dict[str, Written | list[Written]] = Field(default_factory=dict)
    replaces: int | None = None
    zeros: int | None = None
    same: str = ""


# -- writing -------------------------------------------------------------------------------
class Writer:
    """Writes modules down, one after the other.

    Attributes:
        tensors: what the weights file is to hold.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._keys: dict[tuple[Any, ...], str] = {}
        self._paths: dict[int, str] = {}

    def keep(self, key: str, tensor: Tensor) -> str:
        """Have a tensor in the file; returns the key under which it is, which is another one if it was there already."""
        one = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else key
        found = self._keys.setdefault(one, key)  # type: ignore[arg-type]
        self.tensors.setdefault(found, tensor)
        return found

    def write(self, path: str, module: nn.Module) -> Written:
        """One module, by its qualified name.

        Raises:
            ModelError: it cannot be written down.
        """
        if not isinstance(module, Storable):
            raise ModelError(f"{path} is a {type(module).__name__}, which cannot be stored in an exported model")
        if id(module) in self._paths:
            return Written(same=self._paths[id(module)])
        self._paths[id(module)] = path
        replacement = module if isinstance(module, Replacement) else None
        return Written(
            made_of=f"{type(module).__module__}:{type(module).__qualname__}",
            facts={name: _plain(path, name, value) for name, value in module.facts().items()},
            tensors={name: self.keep(f"{path}.{name}", t) for name, t in module.tensors().items()},
            inside={name: self._inside(f"{path}.{name}", m) for name, m in module.inside().items()},
            replaces=None if replacement is None else replacement.replaces,
            zeros=None if replacement is None else replacement.zeros,
        )

    def _inside(self, path: str, module: nn.Module) -> Written | list[Written]:
        if isinstance(module, nn.ModuleList):
            return [self.write(f"{path}.{i}", m) for i, m in enumerate(module)]
        return self.write(path, module)


def storables(model: nn.Module) -> Iterator[tuple[str, Storable]]:
    """The modules of a model that are written down, those inside others left out, in the model's order; shared ones each time."""

    def look(prefix: str, module: nn.Module) -> Iterator[tuple[str, Storable]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, Storable):
                yield path, child
            else:
                yield from look(path, child)

    yield from look("", model)


def _plain(path: str, name: str, value: Any) -> Any:
    """A fact as JSON.

    Raises:
        ModelError: there is no form for it.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [_plain(path, name, v) for v in value]
    raise ModelError(f"{path} has the fact {name} of type {type(value).__name__}, which cannot be stored in an exported model")


# -- reading -------------------------------------------------------------------------------
class Reader:
    """Makes modules again, in the order in which they were written.

    Args:
        name: of the exported model, for sentences.
        tensors: of the weights file.
        packed_in: number format of the model when it was exported; dtype: the one that it is loaded in.
    """

    def __init__(self, name: str, tensors: Mapping[str, Tensor], packed_in: torch.dtype, dtype: torch.dtype):
        self.name, self.tensors, self.packed_in, self.dtype = name, tensors, packed_in, dtype
        self._made: dict[str, nn.Module] = {}
        self._cast: MutableMapping[str, Tensor] = {}

    def read(self, path: str, written: Written, like: nn.Module) -> nn.Module:
        """One module.

        Raises:
            ModelError: an unknown class, a missing tensor, or facts that its class does not take.
        """
        if written.same:
            if written.same not in self._made:
                raise ModelError(
                    f"{self._recipe()} says that {path} is {written.same}, which is not there; export the model again"
                )
            return self._made[written.same]
        cls = self._class(written.made_of)
        facts = {name: _fact(value) for name, value in written.facts.items()}
        if self.dtype != self.packed_in:
            facts.update({n: self.dtype for n in cls.in_model_dtype if facts.get(n) == self.packed_in})
        tensors = {n: (self.tensor if n in cls.in_model_dtype else self._stored)(key, path) for n, key in written.tensors.items()}
        inside = {n: self._inside(f"{path}.{n}", w, like) for n, w in written.inside.items()}
        try:
            made = cls.rebuild(facts, tensors, inside, like)
        except Exception as e:  # the constructors of all methods, given what a file says
            raise ModelError(
                f"{self.name}: {path} cannot be made again as {written.made_of} ({type(e).__name__}: {first_line(e)}); export the model again"
            ) from e
        if isinstance(made, Replacement):
            made.replaces, made.zeros = 1 if written.replaces is None else written.replaces, written.zeros
        self._made[path] = made
        return made

    def _inside(self, path: str, written: Written | list[Written], like: nn.Module) -> nn.Module:
        if isinstance(written, list):
            return nn.ModuleList([self.read(f"{path}.{i}", w, like) for i, w in enumerate(written)])
        return self.read(path, written, like)

    def _class(self, made_of: str) -> type[Storable]:
        home, _, name = made_of.partition(":")
        found: Any = None
        if home.startswith(HOMES):
            try:
                found = getattr(importlib.import_module(home), name, None)
            except ImportError:
                found = None
        if not isinstance(found, type) or not issubclass(found, Storable):
            raise ModelError(
                f"{self._recipe()} names the class {made_of!r}, which this version of Pareto Studio does not have; "
                "install the version that it was exported with, or export the model again"
            )
        return found

    def tensor(self, key: str, path: str) -> Tensor:
        """One in the number format of the model, which follows it; asked twice it is the same.

        Raises:
            ModelError: it is missing.
        """
        tensor = self._stored(key, path)
        if tensor.dtype != self.packed_in or self.dtype == self.packed_in:
            return tensor
        return self._cast.setdefault(key, tensor.to(self.dtype))

    def _stored(self, key: str, path: str) -> Tensor:
        if key not in self.tensors:
            raise ModelError(
                f"the weights of {self.name} lack {key}, which its module {path} needs; copy or export the model again"
            )
        return self.tensors[key]

    def _recipe(self) -> str:
        return f"the recipe of {self.name}"


def _fact(value: Any) -> Any:
    """Inverse of :func:`_plain`; lists become tuples."""
    if isinstance(value, dict):
        return getattr(torch, str(value.get(_DTYPE)), None)
    return tuple(_fact(v) for v in value) if isinstance(value, list) else value
