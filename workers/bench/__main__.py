"""Speed of the engine on this machine: medians and 95 % intervals of ratios. No time is demanded, only told.

The last line of each bench is one JSON object.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from importlib import import_module

import psutil
import typer

from studio_state.errors import StudioError, Unavailable
from workers.bench.plan import DRAWING_MODEL, Plan

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory pass would print a line at every start and stop of the profiler


class Bench(StrEnum):
    """Names of the benches; each is a module of this package."""

    GENERATE = "generate"
    LEAN_DECODE = "lean-decode"
    DYNAMIC_INT8 = "dynamic-int8"
    INT4_LEAN = "int4-lean"
    KERNELS = "kernels"
    SAME_LANE = "same-lane"
    FIRST_BLOCK_CACHE = "first-block-cache"
    KV_POLICIES = "kv-policies"
    KV_QUALITY = "kv-quality"
    WEIGHT_QUALITY = "weight-quality"
    LLAMA_CPP = "llama-cpp"


DRAWING = {Bench.FIRST_BLOCK_CACHE}


def main(
    only: list[Bench] = typer.Option([], help="run this bench alone; may be given several times"),
    quick: bool = typer.Option(False, help="three pairs of short runs: whether everything works, not how fast"),
    model: str = typer.Option("smollm2-135m", help="zoo id, Hub id or folder"),
    drawing_model: str = typer.Option(DRAWING_MODEL, help="the same, for the benches that draw: a pipeline with a transformer"),
    threads: int = typer.Option(0, min=0, help="CPU threads; 0 = all cores"),
) -> None:
    from workers.bench.report import heading

    plan = Plan(model, threads or psutil.cpu_count(logical=False) or 1, drawing_model=drawing_model)
    plan = plan.quick() if quick else plan
    for name in only or list(Bench):
        module = import_module(f"workers.bench.{name.value.replace('-', '_')}")
        why = "" if only else getattr(module, "why_left_out", str)()
        if why:
            print(f"== {name.value}: {why}", flush=True)
            continue
        what = plan.of_pictures if name in DRAWING else plan.of_texts
        print(f"== {name.value}: {(module.__doc__ or '').splitlines()[0]}\n{heading(plan, what)}", flush=True)
        try:
            module.bench(plan)
        except Unavailable as e:
            print(f"{name.value}: skipped: {e}", file=sys.stderr)
        except StudioError as e:
            print(f"{name.value}: {e}", file=sys.stderr)
            raise typer.Exit(1) from e


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
