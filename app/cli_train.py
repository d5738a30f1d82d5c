"""``train``: the command line of the recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

STOPPED_BY_CTRL_C = 130


def train(
    recipe: Annotated[str, typer.Argument(help="What to train; the recipes among `methods`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the checkpoint; afterwards a model for --model DIR.")],
    knob: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="A knob of the recipe.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same weights.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: OMP_NUM_THREADS, else all cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of the training as JSON.")] = False,
) -> None:
    """Train a small model. Ctrl-C stops with the state kept; the same command goes on from there.

    Exit status: 0 the checkpoint is there, 2 refused, 130 Ctrl-C, 1 anything else.
    """
    raise typer.Exit(train_and_show(recipe, out, knob or [], seed, threads, as_json))


def train_and_show(recipe: str, out: Path, knobs: list[str], seed: int, threads: int | None, as_json: bool) -> int:
    """Train in a worker process: progress on stderr, the scores or the record on stdout; returns the exit status.

    Raises:
        SpecError: the recipe, its knobs or the folder are refused.
        StudioError: the training failed.
    """
    from rich.console import Console

    from app.cli_spec import recipe_request
    from app.training import follow, show
    from studio_state.catalog import Catalog
    from studio_state.errors import SpecError, StudioError
    from studio_state.events import Cancelled, Failed
    from studio_state.problems import Problem

    card, values = recipe_request(recipe, knobs, Catalog.load())
    request = {"recipe": card.id, "out": str(out), "knobs": values, "seed": seed, "threads": threads}
    errors = Console(stderr=True, highlight=False)
    last = follow(request, card.title, errors)
    if isinstance(last, Failed):
        raise SpecError([Problem.model_validate(p) for p in last.problems]) if last.problems else StudioError(last.message)
    if isinstance(last, Cancelled):
        errors.print(f"{last.message}; the same command goes on from there", markup=False, soft_wrap=True)
        return STOPPED_BY_CTRL_C
    show(out, as_json)
    return 0
