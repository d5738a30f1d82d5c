"""Questions of several kinds about pictures without an end, drawn by the studio: what vqa and vqa-clips have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

from studio_state.errors import WorkloadError
from studio_state.problems import nearest
from workers.data.pictures import Picture
from workers.workloads.base import Item

ANSWER_TOKENS = 4  # an answer is one word


class Question(Protocol):
    """A question of some kind, and its one right answer."""

    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def answer(self) -> str: ...


def kinds_in(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The kinds that a knob names, separated by commas, in the order in which they are asked.

    Raises:
        WorkloadError: it names none, or one that there is not.
    """
    wanted = [word for part in text.split(",") if (word := part.strip())]
    if not wanted:
        raise WorkloadError(f"kinds is empty; name at least one of {', '.join(known)}")
    for word in wanted:
        if word not in known:
            hint = nearest(word, list(known))
            raise WorkloadError(f"there is no kind of question {word!r}; {hint}allowed: {', '.join(known)}")
    return tuple(kind for kind in known if kind in wanted)


def asked(
    items: int, kinds: Sequence[str], subject: str, drawn: Callable[[int], tuple[Picture, Sequence[Question]]]
) -> list[Item]:
    """So many questions of these kinds, about one drawing after the other.

    Args:
        subject: what is drawn, for the items' ids.
        drawn: a drawing by its number, and what it is asked.
    """

    def every() -> Iterator[Item]:
        for n in count():
            picture, questions = drawn(n)
            for one in questions:
                if one.kind in kinds:
                    data: dict[str, Any] = {"kind": one.kind, "answers": [one.answer]}
                    yield Item(
                        id=f"{subject}-{n}-{one.kind}",
                        prompt=one.text,
                        image=picture,
                        expected=one.answer,
                        max_new_tokens=ANSWER_TOKENS,
                        data=data,
                    )

    return list(islice(every(), items))
