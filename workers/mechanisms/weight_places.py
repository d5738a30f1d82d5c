"""Where the linear maps of a model are that policies may replace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from workers.mechanisms.experts import find_blocks

if TYPE_CHECKING:
    from workers.families.base import Family
    from workers.session import Session


@dataclass(frozen=True)
class Places:
    """Qualified names in a bare model.

    Attributes:
        linears: linear maps inside the layers.
        head, embedding: the output head, and the embedding tied to it.
        convolutions: two-dimensional ones without groups, of families that have them.
        experts: modules that hold the linear maps of a layer's experts in tensors.
    """

    linears: tuple[str, ...]
    head: str | None
    embedding: str | None
    convolutions: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()


def find_places(family: Family, model: nn.Module) -> Places:
    """Look through a model that no policy has changed."""
    parts = family.parts(model)
    head = next(iter(parts.get("head", [])), None)
    embedding = model.get_input_embeddings() if head and hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    tied = isinstance(embedding, nn.Embedding) and embedding.weight is model.get_submodule(str(head)).weight
    name = next((n for n, m in model.named_modules() if m is embedding), None) if tied else None
    experts = tuple(b.experts for b in find_blocks(family, model))
    return Places(tuple(parts["linears"]), head, name, tuple(parts.get("convolutions", ())), experts)


def places(session: Session) -> Places:
    """The same, found once per experiment: by the first policy that asks, before anything is swapped."""
    found: Places = session.once(Places, lambda: find_places(session.family, session.model))
    return found
