"""``space``: the command line of :mod:`app.space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def space(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the Space; empty or new.")],
    title: Annotated[str, typer.Option(help="Title of the Space.")] = "Pareto Studio",
    force: Annotated[bool, typer.Option("--force", help="Replace the Space that is in the folder; its .git is kept.")] = False,
) -> None:
    """Assemble a Hugging Face Space that runs this studio for strangers; nothing is uploaded."""
    from app.components.numbers import byte_quantity
    from app.space import assemble

    made = assemble(folder, title, force)
    size = byte_quantity(made.bytes)
    print(f"the Space is in {made.folder}: {made.files} files, {size.text} {size.unit}")
    print("put it on the Hub:")
    print("  hf repos create YOU/NAME --type space --sdk gradio")
    print(f"  hf upload YOU/NAME {made.folder} . --type space")
