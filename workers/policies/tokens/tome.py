"""Token merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.token_merging import merge_tokens, schedule
from workers.mechanisms.vision_attention import VisionCall, VisionForward, active_vision, gather_tokens
from workers.mechanisms.vision_blocks import between_halves, feature_layers, patches_of
from workers.mechanisms.visual_tokens import Selection, Visual, selecting
from workers.methods import Policy, card, knob
from workers.session import Session


class ToMe(Policy):
    """Merge the image tokens that are most alike, a few in every layer of the vision encoder.

    Bolya et al. 2023, arXiv:2210.09461, section 3: between attention and feed-forward, tokens of the two halves
    with the most similar keys become their size-weighted mean, and attention counts a merged token as often as it
    has patches. In a vision-language model the merged tokens are spread over their patches again for the projector,
    and equal ones enter the language model once. Deviation: the share that is left at the end is set, and the merges
    are spread evenly over the layers, where the paper sets a number per layer. A layer merges at most half of its tokens.
    """

    card: ClassVar[Card] = card(
        id="tome",
        title="ToMe",
        paper="arXiv:2210.09461",
        stage="tokens",
        families=("vit", "vlm"),
        traits=("vision-blocks",),
        owns=("tokens.visual",),
        effects={"visual_tokens": "down"},
        hopes={"images_per_s": "up", "ttft_s": "down"},
        neutral={"keep": 1.0},
    )
    keep: float = knob(0.5, ge=0.05, le=1.0, help="share of image tokens left after the last layer; lower = faster, coarser")

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Merge in every layer that counts; in a VLM also before the language model."""
        return nothing() if self.is_neutral else self._merging(session)

    @contextmanager
    def _merging(self, session: Session) -> Iterator[None]:
        layers = feature_layers(session)
        keys: dict[int, Tensor] = {}
        noting: dict[str, Tensor] = {}

        def watch(call: VisionCall) -> None:
            if call.layer < layers:
                keys[call.layer] = call.key.mean(1)  # [B, T, D]

        def merge(vision: VisionForward, layer: int, hidden: Tensor) -> Tensor:
            before = hidden.shape[1]
            protected = front_tokens(session)
            patches = (before if vision.source is None else vision.source.shape[1]) - protected
            left = schedule(patches, max(1, round(self.keep * patches)), layers)[layer]
            hidden = merge_tokens(vision, hidden, keys.pop(layer), before - protected - left, protected)
            session.did(self.card.id, before - hidden.shape[1])
            return hidden

        def spread(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            vision = active_vision()
            if vision is None or vision.source is None:
                return args
            cut = int(vision.source.max()) + 1 - args[0].shape[1]
            noting["source"] = vision.source[:, cut:]
            return (patches_of(vision, args[0]), *args[1:])

        def unfold(module: nn.Module, args: Any, out: Any) -> None:
            vision = active_vision()
            if vision is not None and vision.source is not None:
                out.last_hidden_state = gather_tokens(out.last_hidden_state, vision.source)

        def once_each(visual: Visual, keep: float) -> Selection:
            return first_of_each(visual, visual.noted["source"])

        with ExitStack() as stack:
            stack.enter_context(session.hooked(session.vision_observers, watch))
            stack.enter_context(between_halves(session, merge, layers))
            for name in session.family.parts(session.model).get("projector", []):
                stack.callback(session.model.get_submodule(name).register_forward_pre_hook(spread).remove)
                stack.enter_context(selecting(session, self.card.id, self.keep, once_each, noting, ranked=False))
            backbone = session.family.backbone(session.model)
            if session.family.id == "vit" and backbone is not session.model:  # a head may read the mean of all patches
                stack.callback(backbone.register_forward_hook(unfold).remove)
            yield


def first_of_each(visual: Visual, source: Tensor) -> Selection:
    """Of the tokens that became one, the first; nothing is dropped where a token is of several patches.

    Args:
        source: [P, C] which encoder token each cell now has.
    """
    everything = torch.arange(len(visual.rows), device=visual.rows.device)
    if source.shape[1] != visual.cells:
        return Selection(everything)
    group = visual.rows.clone()
    of_patch = visual.rows[visual.placed]
    view = torch.div(of_patch, visual.cells, rounding_mode="floor")
    group[visual.placed] = view * (int(source.max()) + 1) + source.flatten()[of_patch]
    _, number = group[visual.placed].unique(return_inverse=True)
    first = torch.full((int(number.max()) + 1,), len(group), device=group.device)
    places = everything[visual.placed]
    first.scatter_reduce_(0, number, places, "amin")
    numbers = torch.full_like(group, -1)
    numbers[visual.placed] = number
    return Selection(visual.with_breaks(first), group=numbers)


def front_tokens(session: Session) -> int:
    """Tokens before the first patch: CLS, and DeiT's distillation token."""
    if "cls-token" not in session.info.traits:
        return 0
    return 2 if "distillation-token" in session.info.traits else 1


def nothing() -> AbstractContextManager[Any]:
    """A context that does nothing."""
    return ExitStack()
