"""The parts of a race that only the screen needs: items, and what lanes make of them. Data."""

from __future__ import annotations

from dataclasses import dataclass, field

from studio_state import events as ev


@dataclass
class Stream:
    """What one lane made of one item.

    Attributes:
        ids: token ids, one tuple per piece of text.
        pieces: the text of each tuple.
        at: seconds since the item began, one per token.
        outcome: the ``Output`` event, once the item is done.
        preview: the newest look at a picture on its way from noise; none once it is drawn.
    """

    ids: list[tuple[int, ...]] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    outcome: ev.Output | None = None
    preview: ev.Preview | None = None

    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time since the first; None before the second token."""
        return (len(self.at) - 1) / (self.at[-1] - self.at[0]) if len(self.at) > 1 and self.at[-1] > self.at[0] else None


@dataclass
class Item:
    """One item of the workload, the same for all lanes. (Its prompt is among the results.)

    Attributes:
        index, of: its place among the items.
        pieces: the prompt, token by token.
        streams: lane -> what it made of the item.
        kept: lane -> which prompt tokens it kept.
        caches: lane -> what every head of its cache held at some moments.
        picture: its image with the places of the image tokens, where it has one.
        image_tokens: lane -> what it did with them.
        experts: lane -> how its experts shared the tokens.
        measured: seq of the latest distance told of its pictures.
    """

    id: str
    index: int = 0
    of: int = 0
    pieces: list[str] = field(default_factory=list)
    streams: dict[int, Stream] = field(default_factory=dict)
    kept: dict[int, ev.Kept] = field(default_factory=dict)
    caches: dict[int, ev.CacheMap] = field(default_factory=dict)
    picture: ev.Picture | None = None
    image_tokens: dict[int, ev.ImageTokens] = field(default_factory=dict)
    experts: dict[int, ev.ExpertLoad] = field(default_factory=dict)
    measured: int = -1
