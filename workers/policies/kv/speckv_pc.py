"""SpecKV-PC."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar

from torch import Tensor

from studio_state.catalog import Card
from workers.families.batches import Batch
from workers.mechanisms.attention import Forward
from workers.mechanisms.cache import StudioCache
from workers.mechanisms.draft_scores import most_noticed, notice, only, to_read
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.look_ahead import LookAheadEvictor
from workers.methods import card, knob
from workers.session import Session


class SpecKVPC(LookAheadEvictor):
    """Shorten the prompt by a draft's attention, then its cache by the draft's look-ahead: two cuts, one run of the draft.

    Galim et al. 2025, arXiv:2506.08373, section 4 (SpecKV-PC): the draft reads the prompt once and writes ahead; its
    attention chooses the prompt tokens that the model reads (SpecPC), and the model's own attention, the look-ahead's
    included, chooses among these what stays cached (SpecKV). Deviations, beside those of the two: ``keep`` is the share of
    the given prompt that stays in the end, and the model reads the share ``keep ** early`` of it, so that at 0.5 both
    cuts are by the same factor (the paper gives both as numbers of tokens: 2048, then 256 to 1024); both have the same
    window. Where nothing is evicted before the answer (``when`` = decode), the whole prompt is read.
    """

    card: ClassVar[Card] = card(
        id="speckv-pc",
        title="SpecKV-PC",
        paper="arXiv:2506.08373",
        not_traits=("ssm",),
        **{
            **EVICTS,
            "families": ("llm",),
            "owns": ("tokens.prompt", "kv.length"),
            "hopes": {"ttft_s": "down", "decode_tokens_per_s": "up"},
        },
    )
    early: float = knob(
        0.5, ge=0.0, le=1.0, help="how much of the cut is made before the prompt is read; more = faster, worse; 0 = SpecKV alone"
    )
    prompt_kernel: int = knob(16, ge=1, le=255, help="width of the neighbourhood that is read with a token")
    start: float = knob(0.5, ge=0.0, le=1.0, help="share of the draft's layers whose attention does not count, from the first")

    @contextmanager
    def _evicting(self, session: Session) -> Iterator[None]:
        read = self.keep**self.early if self.when != "decode" else 1.0
        written: list[Tensor] = []
        with ExitStack() as stack:
            draft = self.draft(session, stack)

            def shorten(batch: Batch) -> Batch:
                counts = to_read(batch.lengths, read, self.window)
                scores, ahead = notice(draft, batch, self.window, self.start, self.look_ahead)
                written[:] = [ahead]
                if counts == batch.lengths:
                    return batch
                places = [most_noticed(s, n, self.window, self.prompt_kernel) for s, n in zip(scores, counts, strict=True)]
                session.did(self.card.id, sum(batch.lengths) - sum(counts))
                return only(session, batch, places)

            def look(cache: StudioCache, forward: Forward) -> Tensor:
                return written[0]

            if self.when != "decode":
                stack.enter_context(session.hooked(session.prompt_filters, shorten))
            rest = self.model_copy(update={"keep": self.keep / read})
            stack.enter_context(rest.foreseeing(session, draft, look))
            yield
