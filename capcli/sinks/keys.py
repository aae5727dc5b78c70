"""The 64 bits by which a run remembers a name, and a set of them that stays small."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_FEWEST = 1 << 10  # places of an empty set
_BITS = (1 << 64) - 1


def key(raw: bytes) -> int:
    """A hash of the name, for this process: among a million names two are alike once in thirty million runs."""
    return hash(raw) & _BITS or 1  # 0 is a free place


class Keys:
    """A set of keys that takes 11 to 22 bytes for each, some 32 while it grows.

    It is a hash table in one array: a key is at its place, or soon after it.
    """

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._table = _places(_FEWEST)
        self._count = 0
        for item in keys:
            self.add(item)

    def __contains__(self, item: int) -> bool:
        table = self._table  # another thread may be adding
        return table[_place(table, item)] == item

    def __len__(self) -> int:
        return self._count

    def add(self, item: int) -> None:
        """Adds a key, which is not 0."""
        table = self._table
        place = _place(table, item)
        if table[place]:
            return
        table[place] = item
        self._count += 1
        if self._count * 4 > len(table) * 3:
            larger = _places(2 * len(table))
            for held in filter(None, table):
                larger[_place(larger, held)] = held
            self._table = larger


def _places(count: int) -> array[int]:
    return array("Q", bytes(8 * count))


def _place(table: array[int], item: int) -> int:
    """Where it is, or would be."""
    last = len(table) - 1
    place = item & last
    while (held := table[place]) and held != item:
        place = place + 1 & last
    return place
