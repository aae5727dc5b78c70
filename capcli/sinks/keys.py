"""Names as 64-bit keys, and a compact set of keys: a run over millions of images remembers every name."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_SMALLEST = 1 << 10  # entries in the table of an empty set
_BITS = (1 << 64) - 1


def key(raw: bytes) -> int:
    """A hash of the name, valid in this process. Never 0: an empty entry of the table is 0.

    Among a million names two have the same key once in thirty million runs.
    """
    return hash(raw) & _BITS or 1


class Keys:
    """A set of keys in 11 to 22 bytes each, about 32 while it grows: an open-addressing hash table in one array.

    One thread may read while another adds.
    """

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._table = _empty(_SMALLEST)
        self._count = 0
        for item in keys:
            self.add(item)

    def __contains__(self, item: int) -> bool:
        table = self._table  # `add` in another thread may replace it
        return table[_index(table, item)] == item

    def __len__(self) -> int:
        return self._count

    def add(self, item: int) -> None:
        table = self._table
        index = _index(table, item)
        if table[index]:
            return
        table[index] = item
        self._count += 1
        if self._count * 4 > len(table) * 3:
            larger = _empty(2 * len(table))
            for present in filter(None, table):
                larger[_index(larger, present)] = present
            self._table = larger


def _empty(size: int) -> array[int]:
    return array("Q", bytes(8 * size))


def _index(table: array[int], item: int) -> int:
    """The index of the item, or of the empty entry where it would go (linear probing)."""
    last = len(table) - 1
    index = item & last
    while (found := table[index]) and found != item:
        index = index + 1 & last
    return index
