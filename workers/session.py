"""What a method may touch: the loaded model, the hooks into its forward passes, the lane's counters.

One :class:`Session` serves one experiment in one worker. Policies change it inside ``attach`` and
undo everything on the way out; nothing of a run is kept on a policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from studio_state.experiment import ExperimentSpec, ModelInfo
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.held import Held
from workers.mechanisms.vision_attention import VisionCall

if TYPE_CHECKING:
    from workers.families.base import Family
    from workers.families.batches import Batch
    from workers.mechanisms.chunk_end import ChunkEnd
    from workers.mechanisms.denoising import Denoising
    from workers.mechanisms.visual_tokens import ImageRecord, Selector
    from workers.workloads.base import Item

Observer = Callable[[AttentionCall], None]
CacheHook = Callable[[StudioCache, Forward], None]
StepForward = Callable[[Tensor, Forward], Tensor]
Decoder = Callable[["Session", Any], Iterator[list[list[int]]]]


class Cancelled(Exception):
    """The person asked to stop; raised between steps."""


@dataclass
class Session:
    """The model of one experiment and everything policies may hang onto it.

    Attributes:
        prompt_filters: called with a batch of prompts before it is read, one after the other: the batch to read in its place.
        observers: called after every attention call, in the order they were attached.
        after_chunk: called after every chunk of the prompt, when it has passed all layers.
        after_prefill: called once the whole prompt is cached (evictions over several layers).
        storage: called after those, so that a storage format never changes what an evictor sees.
        after_step: called after every decode step.
        step_forward: replaces the library's forward for decode steps: (ids [B, T], forward) -> logits [B, T, V].
        decoder: owns the decode loop; None = one token a step.
        before_decode: called with the cache and the number of tokens to come, before the first decode step.
        images: turns images (and the text around them) into what a model that sees is given; None for the others.
        vision_observers: called after every attention call of a vision encoder.
        selectors: choose the image tokens that enter the language model, one after the other.
        seen: per row of the running batch what became of its image tokens.
        retain_queries: how many newest queries each layer remembers across prefill chunks.
        retain_on: whether it remembers them across decode steps too.
        reading: before every attention of a decode step: what it reads in the place of everything stored.
        attending: before every attention: what comes out of it, or None = compute it as usual.
        step_share: denoising steps that run, as a share of those asked for.
        denoising: where the running diffusion pipeline stands; None outside of one.
        companions: models that run beside this one in the lane (a draft model); their weights count as the lane's.
        built: what policies built or loaded, by key; lives as long as the experiment.
        acted: policy id -> how much it did in this lane.
        counts: metric name -> value of the running item.
        say: tells progress inside a long build: (text, share done or None).
    """

    spec: ExperimentSpec
    info: ModelInfo
    family: Family
    model: nn.Module
    processor: Any
    device: torch.device
    dtype: torch.dtype
    images: Any = None
    prompt_filters: list[Callable[[Batch], Batch]] = field(default_factory=list)
    observers: list[Observer] = field(default_factory=list)
    after_chunk: list[Callable[[ChunkEnd], None]] = field(default_factory=list)
    after_prefill: list[CacheHook] = field(default_factory=list)
    storage: list[CacheHook] = field(default_factory=list)
    after_step: list[CacheHook] = field(default_factory=list)
    step_forward: StepForward | None = None
    before_decode: list[Callable[[StudioCache, int], None]] = field(default_factory=list)
    decoder: Decoder | None = None
    retain_queries: int = 0
    retain_on: bool = False
    reading: Callable[[AttentionCall], Held | None] | None = None
    attending: Callable[[AttentionCall], Tensor | None] | None = None
    vision_observers: list[Callable[[VisionCall], None]] = field(default_factory=list)
    selectors: list[Selector] = field(default_factory=list)
    seen: list[ImageRecord] = field(default_factory=list)
    step_share: float = 1.0
    denoising: Denoising | None = None
    companions: list[nn.Module] = field(default_factory=list)
    built: dict[Hashable, Any] = field(default_factory=dict)
    acted: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    is_cancelled: Callable[[], bool] = lambda: False
    say: Callable[[str, float | None], None] = lambda text, done: None

    def check_cancelled(self) -> None:
        """Raise between steps if the person asked to stop.

        Raises:
            Cancelled: a cancel message has arrived.
        """
        if self.is_cancelled():
            raise Cancelled

    def clock(self) -> float:
        """Seconds, after the device has finished everything before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def count(self, name: str, value: float) -> None:
        """Add to a counter of the running item."""
        self.counts[name] = self.counts.get(name, 0.0) + value

    def items_of(self, seed: int, more: int = 0) -> list[Item]:
        """Items of the experiment's workload, drawn from a seed.

        Args:
            more: how many besides those that it runs; a workload whose items do not depend on the seed goes on where it stopped.
        """
        from workers.families.labels import labels_of
        from workers.workloads.base import ItemContext
        from workers.workloads.registry import make_workload, workload_classes

        workload = self.spec.workload
        prop = workload_classes()[workload.id].knob_schema()["properties"]["items"]
        count = min(int(workload.options.get("items", prop["default"])) + more, prop["maximum"])
        workload = workload.model_copy(update={"options": {**workload.options, "items": count}})
        context = ItemContext(self.processor, seed, self.info.context, labels_of(self.model))
        return make_workload(workload).make_items(context)

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a text, without any that the tokenizer adds."""
        from workers.workloads.tokens import encode

        return encode(self.processor, text)

    def did(self, policy: str, amount: float = 1.0) -> None:
        """A policy changed something. What never does anything is flagged ``no effect``."""
        self.acted[policy] = self.acted.get(policy, 0.0) + amount

    def once(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Build something once per experiment (packed weights, fused blocks)."""
        if key not in self.built:
            self.built[key] = build()
        return self.built[key]

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let everything that was built for the experiment go at its end."""
        try:
            yield
        finally:
            self.built.clear()

    @contextmanager
    def hooked(self, hooks: list[Any], hook: Any) -> Iterator[None]:
        """Have ``hook`` in one of the hook lists for a while."""
        hooks.append(hook)
        try:
            yield
        finally:
            hooks.remove(hook)

    @contextmanager
    def having(self, **fields: Any) -> Iterator[None]:
        """Set fields of the session for a while."""
        before = {name: getattr(self, name) for name in fields}
        for name, value in fields.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def remembering(self, queries: int, on: bool = False) -> AbstractContextManager[None]:
        """Have every layer remember at least so many newest queries, while answering too where ``on``."""
        return self.having(retain_queries=max(self.retain_queries, queries), retain_on=self.retain_on or on)

    @contextmanager
    def rerouted(self, forwards: dict[str, Callable[..., Any]]) -> Iterator[None]:
        """Have modules run other forwards for a while; they stay where they are, so that hooks on them go on working.

        Args:
            forwards: qualified name -> function with the arguments of the module's own ``forward``.
        """
        before: list[tuple[nn.Module, Any]] = []
        try:
            for name, forward in forwards.items():
                module = self.model.get_submodule(name)
                before.append((module, vars(module).get("forward")))  # another policy's, or the class's own
                module.forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for module, earlier in reversed(before):
                if earlier is None:
                    del module.forward
                else:
                    module.forward = earlier

    @contextmanager
    def swapped(self, modules: dict[str, nn.Module]) -> Iterator[None]:
        """Put other modules in the place of the model's own, by qualified name, for a while.

        A module that stands in several places (tied weights) is replaced where it is named.
        """
        before: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for name, module in modules.items():
                parent_name, _, child = name.rpartition(".")
                parent = self.model.get_submodule(parent_name)
                before.append((parent, child, getattr(parent, child)))
                setattr(parent, child, module)
            yield
        finally:
            for parent, child, module in reversed(before):
                setattr(parent, child, module)
