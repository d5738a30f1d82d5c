"""Base class of recipes: methods that train something small and hand over a checkpoint.

One file a recipe under ``workers/recipes``; its fields are the knobs, ``card`` describes it,
``train`` does the work. The checkpoint is a plain folder of the library, with a model card.
"""

from __future__ import annotations

import json
import shlex
from abc import ABC, abstractmethod
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from studio_state.catalog import Card
from studio_state.errors import SpecError
from workers.cards import Declared
from workers.training.loop import TrainingRun

FACTS = "training.json"


class Trained(BaseModel):
    """What a recipe hands over beside the weights; kept as ``training.json``.

    Attributes:
        scores: metric -> value on data that the training never saw.
        examples: how many of them.
        measured_on: what they are, in the words of the model card.
        library: that loads the checkpoint, as the model card names it.
        seconds: training time on this machine, by phase.
        data: what it was trained on, and its licence.
        dtype: of the weights.
        origin: how it came to be, in a sentence; ``work`` names what took the seconds.
    """

    recipe: str
    title: str
    architecture: str
    parameters: int
    knobs: dict[str, Any]
    seed: int
    steps: dict[str, int]
    seconds: dict[str, float]
    threads: int
    scores: dict[str, float]
    examples: int
    data: str
    licence: str
    limits: str
    measured_on: str = "examples that the training never saw"
    library: str = "transformers"
    dtype: str = "bfloat16"
    origin: str = "Trained from nothing by Pareto Studio."
    work: str = "Training"


class Recipe(Declared, ABC):
    """Trains something small.

    Subclasses set ``card`` (kind ``recipe``), declare knobs as fields and write ``train``.
    """

    card: ClassVar[Card]

    @abstractmethod
    def train(self, run: TrainingRun) -> Trained:
        """Train, save the checkpoint into ``run.out``, and say what it scored.

        Raises:
            Cancelled: the person asked to stop; the same call goes on from there.
            StudioError: the data is not there.
        """

    @classmethod
    def describe(cls) -> Card:
        """The card completed with summary, docstring and knob schema from the class."""
        import inspect

        return cls.card.model_copy(
            update={"summary": cls.summary_line(), "doc": inspect.getdoc(cls) or "", "knobs": cls.knob_schema()}
        )


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Recipe id -> class.

    Raises:
        RuntimeError: two files declare the same id.
    """
    from workers.methods import classes_in, unique

    return unique(classes_in("workers.recipes", Recipe))


def make_recipe(name: str, knobs: dict[str, Any]) -> Recipe:
    """A recipe with its knobs.

    Raises:
        SpecError: unknown recipe or knob, or a knob out of range.
    """
    known = recipes()
    if name not in known:
        raise SpecError(f"there is no recipe {name!r}; allowed: {', '.join(known)}")
    try:
        return known[name].model_validate(knobs)
    except ValidationError as e:
        first = e.errors()[0]
        raise SpecError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from e


def hand_over(run: TrainingRun, recipe: Recipe, model: Any, **facts: Any) -> Trained:
    """Save a trained model in half precision with its card.

    Args:
        model: of the library, or a pipeline of models; saved as bfloat16 safetensors.
        facts: the other fields of :class:`Trained`.
    """
    is_pipeline = not isinstance(model, nn.Module)
    parts = [part for part in model.components.values() if isinstance(part, nn.Module)] if is_pipeline else [model]
    for part in parts:
        part.bfloat16()
    model.save_pretrained(run.out)
    names = [type(part).__name__ for part in parts]
    return hand_over_facts(
        run,
        recipe,
        architecture=f"{type(model).__name__} ({' + '.join(names)})" if is_pipeline else names[0],
        parameters=sum(p.numel() for part in parts for p in part.parameters()),
        library="diffusers" if is_pipeline else "transformers",
        **facts,
    )


def hand_over_facts(run: TrainingRun, recipe: Recipe, **facts: Any) -> Trained:
    """Write the facts and the model card of a checkpoint that lies in ``run.out`` already.

    Args:
        facts: the fields of :class:`Trained` that neither the run nor the recipe knows.
    """
    trained = Trained(
        recipe=recipe.card.id,
        title=recipe.card.title,
        knobs=recipe.model_dump(),
        seed=run.seed,
        seconds={k: round(v, 1) for k, v in run.seconds.items()},
        threads=torch.get_num_threads(),
        **facts,
    )
    (run.out / FACTS).write_text(trained.model_dump_json(indent=2) + "\n")
    (run.out / "README.md").write_text(model_card(trained))
    return trained


def model_card(trained: Trained) -> str:
    """The facts in words, as a model card."""
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in trained.scores.items())
    phases = ", ".join(f"{n} {s:.0f} s ({trained.steps.get(n, 0)} steps)" for n, s in trained.seconds.items())
    return f"""---
license: {trained.licence.lower()}
library_name: {trained.library}
---
# {trained.title}

`{trained.architecture}`, {trained.parameters:,} parameters, {trained.dtype}. {trained.origin}

* **Data:** {trained.data}
* **{trained.work}:** {phases}, on {trained.threads} CPU thread{"s" if trained.threads > 1 else ""}, seed {trained.seed}.
* **Made again by:** `{command(trained)}`
* **Limits:** {trained.limits}

Measured on {trained.examples:,} {trained.measured_on}:

| metric | value |
|---|---|
{scores}
"""


def command(trained: Trained) -> str:
    """The command that trains the same again: knobs that are not at their default, without the place of the data."""
    defaults = recipes()[trained.recipe].model_fields
    changed = {k: v for k, v in trained.knobs.items() if k != "data" and v != defaults[k].default}
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in changed.items()}
    knobs = [word for k, v in values.items() for word in ("--knob", f"{k}={v}")]
    return shlex.join(
        [
            "pareto-studio",
            "train",
            trained.recipe,
            "--out",
            "DIR",
            "--seed",
            str(trained.seed),
            "--threads",
            str(trained.threads),
            *knobs,
        ]
    )
