"""The classes that a model knows by name."""

from __future__ import annotations

from typing import Any

from workers.families.diffusion_model import DiffusionModel


def labels_of(model: Any) -> tuple[str, ...]:
    """Names of the classes of a classifier, or of those that a pipeline draws; empty for other models."""
    if isinstance(model, DiffusionModel):
        return model.labels
    if "ImageClassification" not in type(model).__name__:
        return ()
    return tuple(str(name) for _, name in sorted(model.config.id2label.items()))
