"""Where the time of some steps goes, by kind of operation, whatever executes them: the library's modules or lean blocks.

PyTorch's profiler records every operator. Operators inside the forward of a replaced linear map are told apart: its products
and what it does besides (unpacking, scaling). Recording slows many small operators more than few large ones, so the
recorded times are scaled to the time of the same steps without recording, and what no operator accounts for is the time of
Python and of launching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from workers.mechanisms.linear import Replacement

Kind = Literal["products", "unpacking", "attention", "elementwise", "moving", "launching"]
KINDS: dict[Kind, str] = {
    "products": "matrix products of the linear maps",
    "unpacking": "what replaced maps do besides: unpacking, scaling, rounding",
    "attention": "attention over the cache",
    "elementwise": "norms, activations, sums",
    "moving": "copies, reshapes, look-ups",
    "launching": "Python and launching",
}
MAP = "studio::map"
OPERATORS = 16  # the costliest ones are listed
_PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "conv", "convolution", "pack_mm", "gemm", "einsum", "dot")
_MOVING = (
    "copy", "_to_copy", "to", "cat", "stack", "index", "gather", "scatter", "embedding", "clone", "contiguous", "repeat",
    "expand", "slice", "select", "view", "reshape", "transpose", "permute", "unsqueeze", "split", "chunk", "empty", "fill",
    "zero", "arange", "pad", "roll", "topk", "sort", "narrow", "flatten", "as_strided", "item", "resolve", "lift", "detach",
)  # fmt: skip


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds of some steps.

    Attributes:
        seconds: of each kind; together the time of the steps without recording.
        operators: the costliest ones: (name, calls, seconds).
        slowed: time with recording over time without.
    """

    seconds: Mapping[Kind, float]
    operators: tuple[tuple[str, int, float], ...]
    slowed: float


def kind_of(name: str) -> Kind:
    """What an operator does, by its name (``aten::mul`` and the like)."""
    bare = name.rpartition("::")[2].lower()
    if "attention" in bare:
        return "attention"
    if any(p in bare for p in ("linear", "pack_mm", "convolution", "gemm")) or bare.removesuffix("_out") in _PRODUCTS:
        return "products"
    return "moving" if any(bare.lstrip("_").startswith(m) for m in _MOVING) else "elementwise"


@contextmanager
def recording() -> Iterator[Recorder]:
    """A recorder; open it before a lane's policies are attached, because they keep the forwards that they find."""
    with _named_maps():
        yield Recorder()


class Recorder:
    """Records some work under the profiler, once."""

    def run(self, work: Callable[[], Any], seconds: float) -> OperatorTimes:
        """Where the time goes.

        Args:
            work: does the steps and returns how long they took, in seconds.
            seconds: how long the same steps take without recording.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profile:
            recorded = float(work())
        found: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        calls: dict[str, list[float]] = {}
        for event in profile.events() or []:
            own = 1e-6 * max(0.0, float(event.self_cpu_time_total))
            if own <= 0 or event.name.startswith(("ProfilerStep", "[memory]", "cuda")):
                continue
            found[_kind(event)] += own
            entry = calls.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += own
        told = sum(found.values())
        found["launching"] += max(0.0, recorded - told)
        scale = seconds / max(recorded, told)
        top = sorted(((n, int(c), s * scale) for n, (c, s) in calls.items()), key=lambda x: -x[2])[:OPERATORS]
        return OperatorTimes({k: v * scale for k, v in found.items()}, tuple(top), recorded / seconds)


def _kind(event: Any) -> Kind:
    """What an operator does where it stands: inside attention, inside a replaced map, or by itself."""
    chain = [event.name, *_chain(event)]
    if any(kind_of(n) == "attention" for n in chain):
        return "attention"
    if any(n != MAP and kind_of(n) == "products" for n in chain):
        return "products"
    return "unpacking" if MAP in chain else kind_of(event.name)


def _chain(event: Any) -> Iterator[str]:
    """Names of the events that it happened in, from the inside to the outside."""
    up = event.cpu_parent
    while up is not None:
        yield up.name
        up = up.cpu_parent


@contextmanager
def _named_maps() -> Iterator[None]:
    """Let the forwards of all replaced maps be recorded under one name for a while."""
    before: list[tuple[type, Any]] = []

    def named(inner: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(MAP):
                return inner(self, *args, **kwargs)

        return forward

    try:
        for cls in _subclasses(Replacement):
            if "forward" in vars(cls):
                before.append((cls, vars(cls)["forward"]))
                cls.forward = named(vars(cls)["forward"])
        yield
    finally:
        for cls, inner in before:
            cls.forward = inner  # type: ignore[attr-defined]


def _subclasses(cls: type) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
