"""``export-model``: a model with its weights packed by a pipeline, as a folder for ``--model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

STOPPED_BY_CTRL_C = 130
RECIPE = "pareto.json"


def export_model(
    model: Annotated[str, typer.Option(help="Zoo id, Hub id org/name[@revision], folder or GGUF file.")],
    pipeline: Annotated[str, typer.Option(help="Policies that replace weights: rtn:bits=4, or @file.json.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder; afterwards a model for --model DIR.")],
    dtype: Annotated[
        str,
        typer.Option(
            help="Number format of what is not packed: float32, bfloat16, float16; auto = as the model's files store it."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    workload: Annotated[
        str | None,
        typer.Option(help="Whose inputs policies calibrate on; default: by the model's family. Language models read a text."),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="An option of that workload.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: OMP_NUM_THREADS, else all cores.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same weights.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the recipe's byte table as JSON.")] = False,
) -> None:
    """Pack a model's weights and write it as a folder, which holds what is packed and nothing of the original weights.

    Prints what the weights should take, take in memory and take on disk. Exit status: 0 the three agree within 2 %, 2 refused,
    130 Ctrl-C, 1 anything else.
    """
    from rich.console import Console

    from app.cli_spec import parse_settings
    from app.training import follow
    from studio_state.errors import SpecError, StudioError
    from studio_state.events import Cancelled, Failed
    from studio_state.pipeline import parse_pipeline
    from studio_state.problems import Problem

    packing = parse_pipeline(pipeline)
    request = {
        "model": model,
        "pipeline": packing.model_dump(mode="json"),
        "out": str(out),
        "device": device,
        "dtype": dtype,
        "workload": {"id": workload, "options": parse_settings(settings or [])} if workload else None,
        "threads": threads,
        "seed": seed,
        "trust_remote_code": trust_remote_code,
    }
    errors = Console(stderr=True, highlight=False)
    last = follow(request, packing.text(), errors, "export")
    if isinstance(last, Failed):
        raise SpecError([Problem.model_validate(p) for p in last.problems]) if last.problems else StudioError(last.message)
    if isinstance(last, Cancelled):
        errors.print(last.message, markup=False, soft_wrap=True)
        raise typer.Exit(STOPPED_BY_CTRL_C)
    raise typer.Exit(show(out, as_json))


def show(out: Path, as_json: bool) -> int:
    """The byte table of an export; returns 1 where its counts do not agree.

    Raises:
        WorkerLost: the worker said that it finished, but left no recipe.
    """
    from app.cli_lists import print_json, print_table
    from studio_state.errors import WorkerLost

    try:
        recipe: dict[str, Any] = json.loads((out / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise WorkerLost(f"the export ended without a recipe in {out}: {e}") from e
    table, complaint = recipe["bytes"], recipe.get("complaint", "")
    if as_json:
        print_json({"out": str(out), "pipeline": recipe["pipeline"], **table, "complaint": complaint})
        return int(bool(complaint))
    explained = table["theoretical"] + table["scales"] + table["padding"]
    rows = [
        (f"the base in {recipe['dtype']}", table["base"], "bytes of its weights in memory"),
        (
            "theoretical",
            explained,
            f"{table['theoretical']:,} by their bits, {table['scales']:,} scales, {table['padding']:,} padding",
        ),
        ("in memory", table["in_memory"], f"{table['computed']:,} of it are computed, not stored"),
        ("on disk", table["on_disk"], f"{table['header']:,} of it are names and places of tensors"),
    ]
    print_table(("weights", "bytes", ""), [(name, f"{count:,}", note) for name, count, note in rows])
    ratio = table["on_disk"] / table["base"]
    print(f"{recipe['pipeline']}: {ratio:.3f} of the base; it is in {out}; use it with --model {out}")
    if complaint:
        print(complaint)
    return int(bool(complaint))
