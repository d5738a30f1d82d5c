"""The experts of a layer as linear maps, one by one, so that whatever replaces linear maps replaces these too.

The library keeps them in tensors with the expert as the first dimension. Here each is a module of its own: a view of
those tensors until a policy puts a replacement in its place.

Shapes: T tokens, E experts, K experts a token visits, C hidden width, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from workers.mechanisms.linear import DenseLinear, Storable

PARTS = ("gate_up_proj", "down_proj")  # [E, 2F, C] and [E, C, F]


def expert_map(weight: Tensor) -> DenseLinear:
    """A linear map on a part [N, K] of the library's tensor; it replaces nothing."""
    view = DenseLinear(weight, None)
    view.replaces = 0
    return view


class ExpertLinears(Storable):
    """Stands where the library's experts stood, and is called as they are.

    Attributes:
        num_experts: how many there are.
        gate_up_proj, down_proj: their linear maps, in the order of the experts.
    """

    def __init__(self, maps: dict[str, Sequence[nn.Module]], act_fn: Any):
        super().__init__()
        self.num_experts, self.act_fn = len(maps[PARTS[0]]), act_fn
        self.gate_up_proj, self.down_proj = (nn.ModuleList(maps[part]) for part in PARTS)

    @classmethod
    def of(cls, experts: Any) -> ExpertLinears:
        """Views of the library's experts; no byte is copied."""
        if isinstance(experts, ExpertLinears):
            return experts
        return cls({part: [expert_map(w) for w in getattr(experts, part).detach()] for part in PARTS}, experts.act_fn)

    def facts(self) -> dict[str, Any]:
        """None: the activation is that of the library's experts."""
        return {}

    def inside(self) -> dict[str, nn.Module]:
        """The linear maps."""
        return {part: getattr(self, part) for part in PARTS}

    @classmethod
    def rebuild(
        cls, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], inside: Mapping[str, Any], like: nn.Module
    ) -> ExpertLinears:
        """Another one of the same linear maps."""
        return cls({part: list(inside[part]) for part in PARTS}, like.act_fn)

    def names(self) -> list[str]:
        """Of its linear maps, below its own name."""
        return [f"{part}.{i}" for i in range(self.num_experts) for part in PARTS]

    def with_maps(self, new: dict[str, nn.Module]) -> ExpertLinears:
        """Another one with some of its linear maps replaced, by their names below its own."""
        maps = {part: [new.get(f"{part}.{i}", m) for i, m in enumerate(getattr(self, part))] for part in PARTS}
        return ExpertLinears(maps, self.act_fn)

    def subset(self, stay: Tensor) -> ExpertLinears:
        """Another one with only these of its experts [n], ascending."""
        return ExpertLinears({part: [getattr(self, part)[i] for i in stay.tolist()] for part in PARTS}, self.act_fn)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Hidden states [T, C] and the visits [T, K] with their weights: [T, C]."""
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = (top_k_index == expert).nonzero(as_tuple=True)
            gate, up = self.gate_up_proj[expert](hidden_states[token]).chunk(2, -1)
            each = self.down_proj[expert](self.act_fn(gate) * up) * top_k_weights[token, place, None]
            out.index_add_(0, token, each.to(out.dtype))
        return out
