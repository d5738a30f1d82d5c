"""The end of a chunk of the prompt: when it has passed all layers, for those who act between chunks or need its logits.

The prefill asks the model for the logits of the newest token only. Those of the other tokens follow from the states
behind the last layer, which stay for a moment here; a few tokens at a time, so that no T x V tensor is kept.

Shapes: B batch, T tokens of the chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from workers.mechanisms.attention import Forward
from workers.session import Session


@dataclass
class ChunkEnd:
    """What is known when a chunk has passed all layers.

    Attributes:
        output: of the model without its head, as the library gives it.
    """

    session: Session
    forward: Forward
    output: Any

    def logits(self, start: int, stop: int) -> Tensor:
        """Logits [B, stop - start, V] behind these tokens of the chunk, by the library's own way from the states to them.

        The layers do not run again: the model without its head hands over the states that it gave before.
        """
        session, some = self.session, self.output.last_hidden_state[:, start:stop]
        output = type(self.output)(**{**self.output, "last_hidden_state": some})
        positions = self.forward.positions[:, start:stop].clamp_min(0)
        with session.rerouted({_name_of_backbone(session): lambda *args, **kwargs: output}):
            found: Tensor = session.model(inputs_embeds=some, position_ids=positions, use_cache=False).logits
        return found


@contextmanager
def ending_chunk(session: Session, forward: Forward) -> Iterator[None]:
    """Run one forward of the prefill inside; then everybody in ``session.after_chunk`` is called."""
    if not session.after_chunk:
        yield
        return
    outputs: list[Any] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    handle = session.family.backbone(session.model).register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
    for hook in session.after_chunk:
        hook(ChunkEnd(session, forward, outputs[-1]))


def _name_of_backbone(session: Session) -> str:
    backbone = session.family.backbone(session.model)
    names: dict[int, str] = {id(module): name for name, module in session.model.named_modules()}
    return names[id(backbone)]
