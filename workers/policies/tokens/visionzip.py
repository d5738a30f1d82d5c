"""VisionZip."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio_state.catalog import Card
from workers.mechanisms.vision_attention import VisionCall
from workers.mechanisms.vision_blocks import feature_layers
from workers.mechanisms.visual_tokens import CHOOSES_IMAGE_TOKENS, ChoosesImageTokens, Selection, Visual, selecting
from workers.methods import card, knob
from workers.session import Session


class VisionZip(ChoosesImageTokens):
    """Keep the image tokens that CLS attends to, and merge the rest into a few that carry the context.

    Yang et al. 2024, arXiv:2412.04467, section 3: in each view the dominant tokens are those with most attention from
    CLS in the layer the features come from; the others are merged, before the projector, into evenly spaced ones
    among them, by similarity of their keys. Deviations: a merged token is the mean of its members (the released
    code adds the mean to the anchor), and CLS itself is not handed over, as LLaVA leaves it out.
    """

    card: ClassVar[Card] = card(
        id="visionzip",
        title="VisionZip",
        paper="arXiv:2412.04467",
        traits=("cls-token",),
        **CHOOSES_IMAGE_TOKENS,
    )
    context: float = knob(
        0.16, ge=0.0, le=0.9, help="share of the kept tokens that are merged ones; more = less detail, more context"
    )

    def attach(self, session: Session) -> AbstractContextManager[Any]:
        """Watch the encoder and what goes into the projector; choose when the image is encoded."""
        return self._choosing(session)

    @contextmanager
    def _choosing(self, session: Session) -> Iterator[None]:
        projector = session.model.get_submodule(session.family.parts(session.model)["projector"][0])
        noting: dict[str, Tensor] = {}
        last = feature_layers(session) - 1

        def watch(call: VisionCall) -> None:
            if call.layer == last:
                noting["attention"], noting["keys"] = call.cls_attention(), call.key.mean(1)[:, 1:]  # [P, C], [P, C, d]

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            noting["hidden"] = args[0]  # [P, C, D]

        with ExitStack() as stack:
            handle = projector.register_forward_pre_hook(note)
            stack.callback(handle.remove)
            stack.enter_context(session.hooked(session.vision_observers, watch))
            stack.enter_context(selecting(session, self.card.id, self.keep, Choice(self, projector).choose, noting))
            yield


class Choice:
    """The choice from what the encoder showed of an image, and the merging."""

    def __init__(self, policy: VisionZip, projector: nn.Module):
        self.policy, self.projector = policy, projector

    def choose(self, visual: Visual, keep: float) -> Selection:
        """Each view has its own budget."""
        if keep >= 1.0:
            return Selection(torch.arange(len(visual.rows), device=visual.rows.device))
        features = visual.features.clone()
        group = torch.full_like(visual.rows, -1)
        kept = [self._view(visual, view, keep, features, group) for view in range(int(visual.rows.max()) // visual.cells + 1)]
        index = visual.with_breaks(torch.cat(kept))
        return Selection(index, features[index], group)

    def _view(self, visual: Visual, view: int, keep: float, features: Tensor, group: Tensor) -> Tensor:
        """Tokens kept of one view; its merged features and their groups are written into the arguments."""
        places = ((visual.rows >= view * visual.cells) & (visual.rows < (view + 1) * visual.cells)).nonzero()[:, 0]
        if not len(places):
            return places
        rows = visual.rows[places]
        budget = max(1, round(keep * len(places)))
        merged = min(round(self.policy.context * budget), budget - 1)
        order = visual.noted["attention"].flatten()[rows].sort(descending=True, stable=True).indices
        dominant, rest = places[order[: budget - merged]], places[order[budget - merged :].sort().values]
        group[dominant] = dominant
        if not merged or not len(rest):
            return dominant
        anchors = rest[torch.arange(merged, device=rest.device) * len(rest) // merged]
        keys = F.normalize(visual.noted["keys"].flatten(0, 1).float(), dim=-1)
        alike = keys[visual.rows[rest]] @ keys[visual.rows[anchors]].T  # [rest, merged]
        of = alike.argmax(1)
        of[torch.isin(rest, anchors)] = torch.arange(merged, device=rest.device)  # an anchor stands for itself
        hidden = visual.noted["hidden"].flatten(0, 1)[visual.rows[rest]]
        total = torch.zeros(merged, hidden.shape[1], dtype=hidden.dtype, device=hidden.device).index_add_(0, of, hidden)
        mean = total / torch.bincount(of, minlength=merged)[:, None]
        features[anchors] = self.projector.forward(mean).to(features.dtype)
        group[rest] = anchors[of]
        return torch.cat([dominant, anchors])
