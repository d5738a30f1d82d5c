"""PyramidKV."""

from __future__ import annotations

from typing import ClassVar

from studio_state.catalog import Card
from workers.cards import knob
from workers.mechanisms.evictor import EVICTS
from workers.mechanisms.layer_budgets import Rule
from workers.mechanisms.window_votes import WindowVotes
from workers.methods import card


class PyramidKV(WindowVotes):
    """Keep more positions in the first layers and fewer in the last, chosen as by SnapKV.

    Cai et al. 2024, arXiv:2406.02069, section 4: attention is spread widely in low layers and narrows to a few
    positions in high ones, so the layers' budgets fall along a straight line. It is SnapKV with ``layers`` =
    pyramid. The window, which every layer keeps, counts to the budget but not to the line, as in the paper. Deviation: the
    budget is a share of the prompt; it is kept on average over layers.
    """

    card: ClassVar[Card] = card(id="pyramidkv", title="PyramidKV", paper="arXiv:2406.02069", **EVICTS)
    layers: Rule = knob("pyramid", help="pyramid = the first layers keep more; uniform = all as much; given = as you say")
