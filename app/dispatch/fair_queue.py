"""The queue of one device: owners take turns, each owner's experiments keep their order."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

from studio_state.errors import DeviceBusy

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Round robin between owners, first in first out within one. Thread-safe and bounded.

    Args:
        limit: experiments waiting in all.
        owner_limit: experiments waiting of one owner.
    """

    def __init__(self, limit: int = 256, owner_limit: int = 32):
        self.limit, self.owner_limit = limit, owner_limit
        self._turns: OrderedDict[str, deque[T]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, owner: str, item: T) -> None:
        """Add an item behind the owner's others.

        Raises:
            DeviceBusy: a limit is reached, or the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise DeviceBusy("the studio is closing; start it again and submit the experiment there")
            waiting = len(self)
            if waiting >= self.limit:
                raise DeviceBusy(f"the queue is full ({waiting} experiments wait); try again when some have finished")
            mine = len(self._turns.get(owner, ()))
            if mine >= self.owner_limit:
                raise DeviceBusy(f"{mine} of your experiments already wait ({self.owner_limit} are allowed); cancel some or wait")
            self._turns.setdefault(owner, deque()).append(item)
            self._changed.notify()

    def get(self, timeout: float | None = None) -> T | None:
        """The next item; None if none came in time or the queue was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._closed, timeout)
            if not self._turns:
                return None
            owner, items = self._turns.popitem(last=False)
            item = items.popleft()
            if items:
                self._turns[owner] = items
            return item

    def remove(self, item: T) -> bool:
        """Take an item out; False if it is not there (any more)."""
        with self._changed:
            for owner, items in self._turns.items():
                if item in items:
                    items.remove(item)
                    if not items:
                        del self._turns[owner]
                    return True
            return False

    def order(self) -> list[T]:
        """The items in the order in which they would be taken if nothing else came."""
        with self._changed:
            turns = [list(items) for items in self._turns.values()]
        depth = max(map(len, turns), default=0)
        return [items[i] for i in range(depth) for items in turns if i < len(items)]

    def close(self) -> list[T]:
        """Refuse further items; returns those that were waiting."""
        with self._changed:
            left = self.order()
            self._turns.clear()
            self._closed = True
            self._changed.notify_all()
            return left

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._closed

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._turns.values()))
