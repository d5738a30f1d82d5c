"""Our 4- and 8-bit lanes against llama.cpp, compiled for this processor, on the same model, threads and tokens.

A round is a process of each: our lanes of one number format race in one, each file of llama.cpp runs in another; the order
rotates from round to round and the median of a process counts, so that pairs are the values of one round. llama.cpp runs the
GGUF file as it is and as Q4_0 (which it repacks for the processor at load), with and without its fused attention; the fastest
of these is what our lanes are held against. Its steps are timed without choosing a token, ours with it.

In the end :data:`DUELS` meet the fastest llama.cpp back to back (:mod:`workers.bench.duel`), one text each in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from studio_state.stats import Interval, ratio_interval
from workers.bench import llama_build
from workers.bench.children import answer
from workers.bench.duel import duel
from workers.bench.plan import Plan
from workers.bench.report import json_line, ratio_line
from workers.host import ModelHost
from workers.models.gguf_file import read_facts

REPACKED_FORMAT = "Q4_0"
REPEATS = 3  # of one process
ROUNDS = 5  # a round takes minutes
LANES = {
    "float32": (
        "rtn:bits=4+lean-decode",
        "rtn:bits=4+quantized-activations+lean-decode",
        "rtn+lean-decode",
        "rtn+quantized-activations+lean-decode",
        "dynamic-int8+lean-decode",
    ),
    "bfloat16": ("rtn:bits=4+lean-decode",),
}
DUELS = LANES["float32"][:2]
Speeds = dict[str, list[float]]


@dataclass(frozen=True)
class Standing:
    """One of our lanes.

    Attributes:
        median: decoded tokens per second.
        to_llama, to_baseline: ratios to the fastest llama.cpp and to the faster baseline.
    """

    median: float
    to_llama: Interval
    to_baseline: Interval


@dataclass(frozen=True)
class Result:
    """What all rounds say.

    Attributes:
        llama, baseline: the fastest of either, by the median.
    """

    llama: str
    baseline: str
    lanes: dict[str, Standing]


def why_left_out() -> str:
    """Why a plain ``make bench`` does not run this; empty if it does."""
    if llama_build.found():
        return ""
    return 'left out, llama.cpp is not built here; `make bench ARGS="--only llama-cpp"` builds it once and runs it'


def bench(plan: Plan) -> None:
    """Print the build, what llama.cpp made of the files, medians, and the ratios of our lanes.

    Raises:
        Unavailable: llama.cpp cannot be built here, or the model has no GGUF file.
    """
    file = llama_build.model_file(plan.model)
    built = llama_build.build(lambda line: print(line, flush=True))
    print(built.told)
    files = {read_facts(f).kind: f for f in (file, built.requantised(file, REPACKED_FORMAT))}
    for kind, f in files.items():
        print(_told(kind, f, built.buffers(f, plan.threads)), flush=True)
    speeds: Speeds = {}
    processes = [partial(_ours, plan, dtype) for dtype in LANES] + [partial(_llama, plan, built, *f) for f in files.items()]
    rounds = min(plan.pairs, ROUNDS)
    for number in range(rounds):
        for process in rotated(processes, number):
            for name, values in process().items():
                speeds.setdefault(name, []).append(median(values))
        print(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {v[-1]:.0f}" for n, v in speeds.items()), flush=True)
    tell(plan, built.told, speeds)
    duels(plan, built, files, result(speeds).llama)


def duels(plan: Plan, built: llama_build.Built, files: Mapping[str, Path], fastest: str) -> None:
    """Print the ratios of :data:`DUELS` to one llama.cpp, back to back.

    Args:
        fastest: its name among the speeds of the rounds.
    """
    (kind,) = (k for k in files if _llama_name(k, False) == fastest or _llama_name(k, True) == fastest)
    flash, host = fastest == _llama_name(kind, True), ModelHost()

    def theirs() -> float:
        timed = built.decode(files[kind], plan.threads, plan.prompt_tokens, plan.new_tokens, 1)
        return next(t.speeds[0] for t in timed if t.flash == flash)

    for lane in DUELS:
        ours, others = duel(plan, lane, theirs, host)
        print(f"{lane} {median(ours):.1f}, {fastest} {median(others):.1f} tokens/s, back to back")
        ratio = ratio_interval(ours, others)
        print(ratio_line(f"{lane} / {fastest}, back to back", ratio), flush=True)
        print(json_line("llama-cpp-duel", plan, lane=lane, against=fastest, ours=ours, theirs=others, ratio=asdict(ratio)))


def rotated(processes: Sequence[Callable[[], Speeds]], number: int) -> list[Callable[[], Speeds]]:
    """Order of round ``number``: ABCD, BCDA, ..."""
    at = number % len(processes)
    return [*processes[at:], *processes[:at]]


def _ours(plan: Plan, dtype: str) -> Speeds:
    sizes = (plan.model, plan.threads, plan.prompt_tokens, plan.new_tokens, REPEATS)
    found: Speeds = answer(f"the race in {dtype}", "race_once", *sizes, dtype, *LANES[dtype])
    return {f"{pipeline} {dtype}": speeds for pipeline, speeds in found.items()}


def _llama(plan: Plan, built: llama_build.Built, kind: str, file: Path) -> Speeds:
    found = built.decode(file, plan.threads, plan.prompt_tokens, plan.new_tokens, REPEATS)
    return {_llama_name(kind, t.flash): t.speeds for t in found}


def _llama_name(kind: str, flash: bool) -> str:
    return f"llama.cpp {kind}{', fused attention' if flash else ''}"


def _told(kind: str, file: Path, buffers: Mapping[str, float]) -> str:
    """What became of a file at load."""
    repacked = [f"{size:.0f} MB" for name, size in buffers.items() if name.endswith("REPACK")]
    held = ", ".join(f"{name} {size:.1f} MB" for name, size in buffers.items())
    return f"{kind}: {file.stat().st_size / 1e6:.1f} MB, {' + '.join(repacked) or 'nothing'} of it repacked at load ({held})"


def result(speeds: Mapping[str, Sequence[float]]) -> Result:
    """Ratios of our lanes to the fastest llama.cpp and to the faster baseline, from the pairs of all rounds.

    Args:
        speeds: tokens per second of each round by name; names of llama.cpp and of baselines begin so.
    """
    medians = {name: median(values) for name, values in speeds.items()}
    llama, baseline = (
        max((n for n in medians if n.startswith(who)), key=medians.__getitem__) for who in ("llama.cpp", "baseline")
    )
    ours = [n for n in medians if not n.startswith(("llama.cpp", "baseline"))]
    lanes = {
        n: Standing(medians[n], *(ratio_interval(list(speeds[n]), list(speeds[other])) for other in (llama, baseline)))
        for n in ours
    }
    return Result(llama, baseline, lanes)


def tell(plan: Plan, build: str, speeds: Mapping[str, Sequence[float]]) -> None:
    """Print medians, ratios and the JSON line."""
    found, medians = result(speeds), {name: median(values) for name, values in speeds.items()}
    for name, value in medians.items():
        print(f"{name}: {value:.1f} tokens/s (median of {len(speeds[name])})")
    for name, lane in found.lanes.items():
        print(ratio_line(f"{name} / {found.llama}", lane.to_llama))
        print(ratio_line(f"{name} / {found.baseline}", lane.to_baseline))
    told = {name: asdict(lane) for name, lane in found.lanes.items()}
    print(
        json_line(
            "llama-cpp", plan, build=build, medians=medians, fastest_llama=found.llama, faster_baseline=found.baseline, lanes=told
        )
    )
