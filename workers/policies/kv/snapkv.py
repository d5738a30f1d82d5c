"""SnapKV."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.window_votes import WindowVotes
from workers.methods import card


class SnapKV(WindowVotes):
    """Keep the cached prompt positions that the last prompt tokens attend to most.

    Li et al. 2024, arXiv:2404.14469, section 3: the attention of the last ``window`` queries is
    summed per position, smoothed by pooling, and the best positions stay with the window itself.
    Deviations: votes of the query heads of one KV head are averaged (the paper's models have no
    grouped queries), a vote is smoothed over the neighbours that it has (the released code counts what
    lies beyond the ends as 0), and the budget is a share of the prompt, window included.
    """

    card: ClassVar[Card] = card(id="snapkv", title="SnapKV", paper="arXiv:2404.14469", **EVICTS)
