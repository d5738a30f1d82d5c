"""KeyDiff."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from studio_state.catalog import Card
from workers.mechanisms.attention import AttentionCall
from workers.mechanisms.eviction import Guarded
from workers.mechanisms.evictor import EVICTS, Evictor
from workers.methods import card, knob


class KeyDiff(Evictor):
    """Keep the cached positions whose keys point in other directions than most.

    Park et al. 2025, arXiv:2504.15364, section 3: distinctive keys draw attention, whoever asks. An entry is scored by
    minus the cosine between its key and an anchor, the mean of all normalised keys of its KV head; no attention is
    needed and every KV head chooses for itself. ``recent`` guards the newest positions (the paper's variant with a
    sliding window). The anchor is a mean over real entries, so padding does not turn it. Deviation: by default it acts
    once, at the end of the prompt; the paper reads the prompt in blocks and evicts after each (``between_chunks``) and
    while answering (``when`` = both).
    """

    card: ClassVar[Card] = card(id="keydiff", title="KeyDiff", paper="arXiv:2504.15364", **EVICTS)
    recent: int = knob(0, ge=0, le=512, help="newest positions that always stay; 0 = only keys decide")

    def scores(self, call: AttentionCall) -> Tensor:
        """Minus the cosine to the anchor [B, H, S]."""
        held = call.held
        keys = F.normalize(held.keys.float(), dim=-1)
        real = keys if held.real is None else keys * held.real[..., None]
        anchor = F.normalize(real.sum(2, keepdim=True), dim=-1)  # the direction of the mean
        return -(keys * anchor).sum(-1)

    def guarded(self, call: AttentionCall) -> Guarded:
        """The newest positions, as many as the prompt has."""
        return Guarded(recent=min(self.recent, call.forward.prompt_tokens))
