"""Where the weight bytes of a model with replacements go, and whether they are what their bits say.

``bits`` of a replacement is a claim, its storages are a fact. What a format needs by its bits, what its scales and paddings take
beside that, and what is held are told apart here, so that no lane is called 4-bit that holds 16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from workers.mechanisms.linear import Replacement, held_bytes, tensor_bytes

TOLERANCE = 0.02  # of the bytes held


class Ledger(NamedTuple):
    """Bytes of all weights of some modules.

    Attributes:
        theoretical: bits of a code times weights of each replaced map; everything else (biases, norms, embeddings) as it is.
        scales, padding: what the formats take beside their codes.
        held: what is measured.
    """

    theoretical: float
    scales: int
    padding: int
    held: int

    @property
    def explained(self) -> float:
        """What should be held."""
        return self.theoretical + self.scales + self.padding

    @property
    def agrees(self) -> bool:
        """What is held is what should be, within 2 %."""
        return abs(self.held - self.explained) <= TOLERANCE * self.held

    def complaint(self) -> str:
        """In plain words; empty where it agrees."""
        if self.agrees:
            return ""
        more = "more" if self.held > self.explained else "less"
        return (
            f"bytes: its weights hold {self.held / 1e6:,.2f} MB, {abs(self.held / self.explained - 1):.0%} {more} than the "
            f"{self.explained / 1e6:,.2f} MB of its bits, scales and padding"
        )


def weight_ledger(roots: Iterable[nn.Module]) -> Ledger | None:
    """The bytes of some modules; None where nothing in them is replaced."""
    roots = list(roots)
    replaced = outermost(roots)
    if not replaced:
        return None
    books = [r.ledger() for r in replaced]
    codes = sum(r.bits * r.in_features * r.out_features / 8 for r in replaced)
    inside = {id(m) for r in replaced for m in r.modules()}
    outside = [m for root in roots for m in root.modules() if id(m) not in inside]
    rest = tensor_bytes(t for m in outside for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
    theoretical = codes + rest + sum(b["bias"] for b in books)
    return Ledger(theoretical, sum(b["scales"] for b in books), sum(b["padding"] for b in books), held_bytes(roots))


def outermost(roots: Iterable[nn.Module]) -> list[Replacement]:
    """The replacements among some modules and inside them that are in no other one, each once, in the model's order."""
    found: dict[int, Replacement] = {}

    def look(module: nn.Module) -> Iterator[Replacement]:
        if isinstance(module, Replacement):
            yield module
            return
        for child in module.children():
            yield from look(child)

    for root in roots:
        found.update({id(r): r for r in look(root)})
    return list(found.values())
