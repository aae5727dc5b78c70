"""Who sits where: images in slots, and when a slot that reports itself finished may be believed. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Slots(Generic[Item]):
    """The seats of the running batch. Time is counted in steps: `now` is how many have been started.

    A reading of the finished flags may be some steps old. It says nothing of an image seated after it was taken, so such a slot
    is left alone until a later reading.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.now = 0
        self._free = list(range(count))  # a heap, lowest first: where images sit hangs on when they come alone
        self._seated: dict[int, tuple[Item, int]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def busy(self) -> bool:
        return bool(self._seated)

    @property
    def items(self) -> list[Item]:
        """Everything seated, in the order of arrival."""
        return [item for item, _ in self._seated.values()]

    def seat(self, items: Sequence[Item]) -> list[int]:
        """Gives each item a free slot; raises IndexError when there are too few."""
        seats = [heapq.heappop(self._free) for _ in items]
        self._seated.update({seat: (item, self.now) for seat, item in zip(seats, items, strict=True)})
        return seats

    def finished(self, flags: Sequence[bool], taken: int) -> list[int]:
        """The slots whose image has ended, by `flags` [count] read after `taken` steps had been started."""
        return [seat for seat, (_, since) in self._seated.items() if flags[seat] and since < taken]

    def leave(self, seat: int) -> Item:
        """Empties a slot and says who sat there."""
        item, _ = self._seated.pop(seat)
        heapq.heappush(self._free, seat)
        return item
