"""Ada-KV."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.mechanisms.evictor import EVICTS, Heads, heads_knob
from workers.mechanisms.window_votes import WindowVotes
from workers.methods import card


class AdaKV(WindowVotes):
    """Let heads whose attention is spread keep more positions than heads that look at a few, chosen as by SnapKV.

    Feng et al. 2024, arXiv:2407.11550, algorithm 1: one ranking over all heads of a layer shares its budget among
    them; a share of it, the safeguard, is dealt out equally. It is SnapKV with ``heads`` = adaptive. Every head's memory
    really shrinks to what it keeps, so a layer frees what equal heads would free: heads' budgets are rounded so that they
    add up (the released code rounds each by itself). In a batch a head is as long as its longest row.
    """

    card: ClassVar[Card] = card(id="adakv", title="Ada-KV", paper="arXiv:2407.11550", **EVICTS)
    heads: Heads = heads_knob("adaptive", group=None)
