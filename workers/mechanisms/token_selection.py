"""Letting only some prompt tokens travel through the later layers.

During the prefill one attention call chooses; the library's decoder layers behind it then receive the
hidden states, rotary embeddings and positions of the chosen tokens only. Masks and caches follow by
themselves, because attention asks :meth:`Forward.positions_at`. A later layer may choose again, among
what is left.

Shapes: B batch, L prompt tokens, n chosen ones, H KV heads, C hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from studio_state.errors import Unavailable
from workers.mechanisms.attention import AttentionCall, Forward
from workers.mechanisms.cache import StudioCache
from workers.session import Session

Select = Callable[[AttentionCall], Tensor | None]


@contextmanager
def narrowing(session: Session, policy: str, after: int, select: Select) -> Iterator[None]:
    """Let ``select`` choose, in layer ``after`` of a whole-prompt prefill, which tokens go on behind it.

    The layers are hooked from the choice to the end of the prefill only, so decode steps never notice.

    Args:
        after: index of the layer whose attention call is handed to ``select``; it still runs on all tokens.
        select: attention call -> indices [B, n] into the tokens that reach this layer, ascending; None = all.

    Raises:
        Unavailable: the model is of an older form (as GPT-2) whose last states must be as many as the prompt's tokens.
    """
    names = session.family.parts(session.model)["layers"]
    if not names or names[0].split(".")[-2] != "layers":  # older forms call them ``h``
        raise Unavailable(
            f"{session.info.name} is of an older form (as GPT-2) in which all tokens go through all layers; "
            f"remove {policy}, or choose another model"
        )

    layers = [session.model.get_submodule(n) for n in names]

    def observe(call: AttentionCall) -> None:
        if call.layer != after or call.forward.phase != "prefill":
            return
        index = select(call)
        if index is None:
            return
        call.forward.narrowed.append((after + 1, index))
        session.did(policy, call.query.shape[2] - index.shape[1])
        for number, layer in enumerate(layers[after + 1 :], after + 1):
            hooks.callback(layer.register_forward_pre_hook(_narrow(index, first=number == after + 1), with_kwargs=True).remove)

    def unhook(cache: StudioCache, forward: Forward) -> None:
        hooks.close()

    with ExitStack() as hooks, session.hooked(session.observers, observe), session.hooked(session.after_prefill, unhook):
        yield


@contextmanager
def truncating(session: Session, last: int) -> Iterator[None]:
    """After the prefill, drop from the layers before each selection what it did not choose.

    Args:
        last: no selection behind this layer cuts anything.
    """

    def truncate(cache: StudioCache, forward: Forward) -> None:
        for first, index in forward.narrowed:  # each index counts among what the selections before it left
            for layer in cache.layers[: first if first <= last + 1 else 0]:
                if layer.groups:  # a layer that is left out holds nothing
                    heads = layer.groups[-1].stop
                    layer.keep(index[:, None].expand(-1, heads, -1))

    with session.hooked(session.after_prefill, truncate):
        yield


def _narrow(index: Tensor, first: bool) -> Callable[..., Any]:
    """A hook that hands a decoder layer the chosen tokens' rotary embeddings and positions, the first also their states."""

    def narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        changed = dict(kwargs)
        if changed.get("position_embeddings") is not None:
            changed["position_embeddings"] = tuple(_rows(x, index) for x in changed["position_embeddings"])
        if changed.get("position_ids") is not None:
            changed["position_ids"] = _rows(changed["position_ids"], index)
        if first and args:
            args = (_rows(args[0], index), *args[1:])
        elif first:
            changed["hidden_states"] = _rows(changed["hidden_states"], index)
        return args, changed

    return narrow


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``index`` [B, n] of ``x`` [B or 1, L] or [B or 1, L, C]."""
    x = x.expand(index.shape[0], *x.shape[1:])
    if x.dim() == 2:
        return x.gather(1, index)
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
