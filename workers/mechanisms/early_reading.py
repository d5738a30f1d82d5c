"""Reading a prompt with the first layers alone to find the tokens worth reading, and then those only, from the start.

Shapes: B batch, L padded prompt length, n chosen tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from workers.families.batches import Batch
from workers.families.llm import LanguageFamily
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.cache import PADDING
from workers.mechanisms.drafting import layer_list
from workers.mechanisms.state_layer import cache_for
from workers.session import Session

Select = Callable[[AttentionCall, Tensor], Tensor | None]


@contextmanager
def reading_early(session: Session, policy: str, layers: int, select: Select) -> Iterator[None]:
    """Hand only the prompt tokens on to the prefill that ``select`` chooses by the attention of an early layer.

    The first layers run on the whole prompt, in chunks where asked, with a cache that is let go; nobody evicts from it
    and no hook but ``select`` sees it.

    Args:
        layers: how many of the first layers read everything, more where these have only running states; the last of
            them that attends is asked.
        select: (attention call at the end of the prompt, which of its tokens are real [B, L]) -> columns [B, n],
            ascending, padding first; None = all.

    Raises:
        Unavailable: the model does not keep its layers in one list.
    """
    reading = cast(LanguageFamily, session.family)
    name, whole = layer_list(session)
    attentions = reading.parts(session.model)["attentions"]
    attending = [n for n in range(len(whole)) if f"{name}.{n}.self_attn" in attentions]
    early = whole[: max(layers, min(attending, default=0) + 1)]

    def shorten(batch: Batch) -> Batch:
        latest: dict[str, AttentionCall] = {}

        def observe(call: AttentionCall) -> None:
            latest["call"] = call

        alone = {"observers": [observe], "after_chunk": [], "retain_queries": 0, "retain_on": False}
        with session.swapped({name: early}), session.having(**alone):
            reading.read(session, batch, cache_for(session))
        index = select(latest["call"], batch.positions != PADDING) if latest else None
        if index is None:
            return batch
        short = batch.only(index)
        session.did(policy, (sum(batch.lengths) - sum(short.lengths)) / len(batch.lengths))
        _note_dropped(session, batch, index, len(early) / len(whole))
        return short

    with session.hooked(session.prompt_filters, shorten):
        yield


def _note_dropped(session: Session, batch: Batch, index: Tensor, depth: float) -> None:
    """Image tokens that are not read again went through the first layers only."""
    if batch.image_tokens is None:
        return
    for row, record in enumerate(session.seen):
        going = set(index[row].tolist())
        columns = batch.image_tokens[row].nonzero()[:, 0].tolist()
        for token, column in zip(record.entered, columns, strict=True):
            if column not in going:
                record.share[token] = min(record.share[token], depth)
