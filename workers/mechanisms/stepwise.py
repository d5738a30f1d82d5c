"""A library call that reports through a callback, run as a generator.

The call has its own stack (a greenlet) in the same thread, so that the profiler, inference mode and
whatever else belongs to a thread goes on holding inside it, and nothing of it runs while the caller
works on what was handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")


def stepwise(work: Callable[[Callable[[T], None]], None]) -> Generator[T, None, None]:
    """Yield what ``work`` hands over, and let it stand still meanwhile.

    Args:
        work: gets the function that hands a value over; whatever it raises is raised here.
    """

    def hand(value: T) -> None:
        outer.switch(value)

    outer = getcurrent()
    call = greenlet(lambda: work(hand))
    try:
        value = call.switch()
        while not call.dead:
            yield value
            outer = getcurrent()
            value = call.switch()
    finally:
        if not call.dead:  # the caller goes before the end: the call ends where it stands, its ``finally`` blocks run
            call.throw()
