"""Operations and bytes of the steps of a run, counted on the shapes that really go through the model.

Counted by looking on while the library's modules run: a linear map reads its weights once a call, whatever holds them;
attention reads the keys and values that its cache holds. A model's own maps and replaced ones are counted alike, and those that
no policy may replace (the first layer of an encoder, what surrounds a denoiser) with them.

Shapes: R rows of a call, N outputs, K inputs of a map; T new tokens, S stored ones, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from studio_state.costs import Work, total
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.linear import held_bytes
from workers.mechanisms.vision_attention import VisionCall
from workers.mechanisms.weight_places import Places, places
from workers.session import Session

ATTENTION = "attention"


class StepWork:
    """Work of the calls since it was last emptied, by kind of map.

    Attributes:
        work: name of the kind (the last part of a map's name, such as ``up_proj``) -> what all of them did.
    """

    def __init__(self) -> None:
        self.work: dict[str, Work] = {}

    def add(self, more: Work) -> None:
        """Count some work under its name."""
        before = self.work.get(more.name)
        self.work[more.name] = more if before is None else total((before, more), more.name, more.group)

    def take(self) -> list[Work]:
        """What was counted; counting starts anew."""
        found, self.work = list(self.work.values()), {}
        return found


@contextmanager
def counting(session: Session) -> Iterator[StepWork]:
    """Look on for a while; runs must go through the library's modules, not through lean blocks."""
    counted, spots = StepWork(), places(session)
    with ExitStack() as stack:
        named = {*spots.linears, *spots.convolutions, *([spots.head] if spots.head else [])}
        for name in (*named, *_others(session.model, (*named, *spots.experts))):
            handle = session.model.get_submodule(name).register_forward_hook(partial(_map, counted, kind_of_map(name, spots)))
            stack.callback(handle.remove)
        for name in spots.experts:
            stack.callback(session.model.get_submodule(name).register_forward_hook(partial(_experts, counted)).remove)
        stack.enter_context(session.hooked(session.observers, partial(_attention, counted)))
        stack.enter_context(session.hooked(session.vision_observers, partial(_seen, counted)))
        if session.family.id == "diffusion":  # its attentions are the library's own
            stack.enter_context(_Attending(counted))
        yield counted


def _others(model: nn.Module, taken: Iterable[str]) -> list[str]:
    """Linear maps and convolutions that are no place for a policy, nor inside one."""
    roots = set(taken)

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:i]) in roots for i in range(1, len(parts) + 1))

    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and not inside(n)]


class _Attending(TorchFunctionMode):
    """Counts every call of PyTorch's attention, whoever makes it."""

    def __init__(self, counted: StepWork):
        self.counted = counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            _counted_attention(self.counted, given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


def kind_of_map(name: str, spots: Places) -> str:
    """Under which name a map is counted: its own last part, ``head`` for the output head."""
    if name == spots.head:
        return "head"
    parts = [p for p in name.split(".") if not p.isdigit()]
    return parts[-1]


def _map(counted: StepWork, name: str, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    x: Tensor = args[0]
    weights = float(held_bytes([module]))
    if x.dim() == 4 and out.dim() == 4 and hasattr(module, "kernel_size" if isinstance(module, nn.Conv2d) else "window"):
        window = module.kernel_size if isinstance(module, nn.Conv2d) else module.window
        inputs = x.shape[1] // getattr(module, "groups", 1) * window[0] * window[1]  # type: ignore[operator, index]
    else:
        inputs = x.shape[-1]
    moved = x.numel() * x.element_size() + out.numel() * out.element_size()
    counted.add(Work(name=name, flops=2.0 * out.numel() * inputs, weight_bytes=weights, activation_bytes=moved))


def _experts(counted: StepWork, module: Any, args: tuple[Any, ...], out: Tensor) -> None:
    """The experts that are visited are read; each visit is three products."""
    x, visits = args[:2]
    hit = int(visits[visits < module.num_experts].unique().numel())
    share = hit / module.num_experts
    maps = [m for m in module.modules() if hasattr(m, "in_features")]
    if maps:
        each = sum(m.in_features * m.out_features for m in maps) / module.num_experts
    else:
        each = (module.gate_up_proj.numel() + module.down_proj.numel()) / module.num_experts
    moved = 2.0 * x.numel() * x.element_size()
    done = int((visits < module.num_experts).sum())
    counted.add(Work(name="experts", flops=2.0 * done * each, weight_bytes=held_bytes([module]) * share, activation_bytes=moved))


def _attention(counted: StepWork, call: AttentionCall) -> None:
    b, heads, t, d = call.query.shape
    stored = call.keys.shape[2]
    moved = 2.0 * call.query.numel() * call.query.element_size()
    kv = float(call.cache.nbytes())
    counted.add(
        Work(name=ATTENTION, group="attention", flops=4.0 * b * heads * t * stored * d, kv_bytes=kv, activation_bytes=moved)
    )


def _seen(counted: StepWork, call: VisionCall) -> None:
    _counted_attention(counted, call.query, call.key, call.key)  # values have the keys' shape


def _counted_attention(counted: StepWork, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Attention without a cache: queries [B, H, T, D], keys and values [B, H or fewer, S, D], and an output like the queries."""
    rows, width = query.numel() // query.shape[-1], query.shape[-1] + value.shape[-1]
    moved = float(query.numel() + key.numel() + value.numel() + rows * value.shape[-1]) * query.element_size()
    counted.add(Work(name=ATTENTION, group="attention", flops=2.0 * rows * key.shape[-2] * width, activation_bytes=moved))
