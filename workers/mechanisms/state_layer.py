"""What a state-space layer remembers: a state of fixed size instead of keys and values.

Mamba-like layers keep the inputs of their short convolution and a recurrent state; both are overwritten
with every token, so that nothing can be evicted from them and nothing taken back. Some layers hold keys
and values beside the state (Falcon-H1); a hybrid model has layers of both kinds.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import PADDING, KVLayer, StudioCache

if TYPE_CHECKING:
    from workers.session import Session


class StateLayer(LinearAttentionLayer, KVLayer):  # type: ignore[misc]
    """The state of one layer; its keys and values too, where it has some.

    Args:
        keeps_kv: the layer also attends to earlier tokens.
        states: how many states the layer runs side by side.
    """

    is_compileable = False

    def __init__(self, keeps_kv: bool = False, states: int = 1) -> None:
        KVLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=states)
        self.keeps_kv, self.states = keeps_kv, states

    def tensors(self) -> list[Tensor]:
        """All states that are filled: [B, channels, kernel] and [B, heads, width, state size]."""
        return [t for t in (*self.conv_states.values(), *self.recurrent_states.values()) if t is not None]

    def nbytes(self) -> int:
        """Bytes of the states, and of keys and values beside them."""
        return sum(t.numel() * t.element_size() for t in self.tensors()) + KVLayer.nbytes(self)

    def crop_newest(self, count: int) -> None:
        """Refused: a state has no history.

        Raises:
            RuntimeError: always, but for nothing to take back.
        """
        if count:
            raise RuntimeError("the state of a state-space layer cannot be taken back; problems() should have refused this")

    def clone(self) -> StateLayer:
        """An independent copy."""
        twin = StateLayer(self.keeps_kv, self.states)
        kv = KVLayer.clone(self)
        twin.groups, twin.seen, twin.query_tail, twin.is_initialized = kv.groups, kv.seen, kv.query_tail, kv.is_initialized
        twin.notes = kv.notes
        for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size"):
            setattr(twin, name, dict(getattr(self, name)))
        twin.conv_states = {i: None if t is None else t.clone() for i, t in self.conv_states.items()}
        twin.recurrent_states = {i: None if t is None else t.clone() for i, t in self.recurrent_states.items()}
        twin.device, twin.dtype = self.device, self.dtype
        return twin


def cache_for(session: Session) -> StudioCache:
    """An empty cache with the kinds of layers that the model has, as the library tells them apart."""
    cache = StudioCache(session.info.layers)
    if "ssm" in session.info.traits:
        model: Any = session.model
        kinds = DynamicCache(config=model.config).layers
        cache.layers = [
            StateLayer(isinstance(kind, DynamicLayer), kind.number_of_states)
            if isinstance(kind, LinearAttentionCacheLayerMixin)
            else KVLayer()
            for kind in kinds
        ]
    return cache


def advance(cache: StudioCache, seen: int) -> None:
    """Tell state layers, which do not count, how many positions the model has seen."""
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            layer.seen = seen


def state_arguments(model: Any, forward: Forward) -> dict[str, Any]:
    """How a model with state-space layers is given its cache, its positions and, in a padded batch, its padding.

    Attention takes padding from the positions; a state would run over it, so these models are told of it too.
    """
    known = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"past_key_values" if "past_key_values" in known else "cache_params": forward.cache}
    if "position_ids" in known:
        given["position_ids"] = forward.positions.clamp_min(0)
    if forward.padded and forward.positions.shape[1] > 1:
        given["attention_mask"] = (forward.positions != PADDING).long()
    return given
