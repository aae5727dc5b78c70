"""The assignment of images to the slots of the running batch. Independent of the loop and of torch, so it is tested alone."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Slots(Generic[Item]):
    """The slots of the running batch. Time is counted in steps: `now` is the number of steps that have been started.

    The finished flags may be read some steps late. A reading taken before an item was admitted does not apply to that item, so
    its slot is not finished until a later reading.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.now = 0
        self._free = list(range(count))  # a heap: the lowest slot is taken first, so that placement is deterministic
        self._occupied: dict[int, tuple[Item, int]] = {}  # slot -> item, step of its admission

    @property
    def free(self) -> int:
        """The number of free slots."""
        return len(self._free)

    @property
    def busy(self) -> bool:
        """Whether any slot is occupied."""
        return bool(self._occupied)

    @property
    def items(self) -> list[Item]:
        """The items in slots, in the order of admission."""
        return [item for item, _ in self._occupied.values()]

    def admit(self, items: Sequence[Item]) -> list[int]:
        """Puts each item into a free slot and returns the slots; raises IndexError when there are too few."""
        slots = [heapq.heappop(self._free) for _ in items]
        self._occupied.update({slot: (item, self.now) for slot, item in zip(slots, items, strict=True)})
        return slots

    def finished(self, flags: Sequence[bool], step: int) -> list[int]:
        """The slots whose item has finished, by `flags` [count] that were read after `step` steps had been started."""
        return [slot for slot, (_, since) in self._occupied.items() if flags[slot] and since < step]

    def release(self, slot: int) -> Item:
        """Frees a slot and returns its item."""
        item, _ = self._occupied.pop(slot)
        heapq.heappush(self._free, slot)
        return item
