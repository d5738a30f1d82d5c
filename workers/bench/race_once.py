"""One process of a comparison with another program: race some lanes of one number format, print one JSON line."""

from __future__ import annotations

import json
import sys

import typer

from studio_state.errors import StudioError
from workers.bench.lanes import race
from workers.bench.plan import Plan


def main(model: str, threads: int, prompt_tokens: int, new_tokens: int, pairs: int, dtype: str, lanes: list[str]) -> None:
    """Print decoded tokens per second of the baseline and of each lane, one value a repetition."""
    plan = Plan(model, threads, pairs=pairs, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    try:
        print(json.dumps({lane.pipeline: lane.speeds for lane in race(plan, lanes, dtype)}))
    except StudioError as e:
        print(e, file=sys.stderr)
        raise typer.Exit(1) from e


if __name__ == "__main__":
    typer.run(main)
