"""The eight bytes by which a run remembers a name, and a set of them that stays small."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

_LOOSE = 1 << 15  # keys held in a set before they become an array: some 3 MB
_LARGER = 4  # times as many keys as the next array has: such a one is not sorted anew, nor held twice meanwhile


def key(raw: bytes) -> int:
    """64 bits of the name's hash: among a million names two are alike once in thirty million runs."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")


class Keys:
    """A set of keys that takes eight bytes for each."""

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._loose: set[int] = set()
        self._sorted: tuple[array[int], ...] = (_sorted([array("Q", keys)]),)  # a few, the largest first

    def __contains__(self, item: int) -> bool:
        # another thread may be adding
        return item in self._loose or any(_holds(each, item) for each in self._sorted)

    def __len__(self) -> int:
        return sum(map(len, self._sorted)) + len(self._loose)

    def add(self, item: int) -> None:
        if item in self:
            return
        self._loose.add(item)
        if len(self._loose) >= _LOOSE:
            kept, fresh = list(self._sorted), [array("Q", self._loose)]
            while kept and len(kept[-1]) < _LARGER * sum(map(len, fresh)):
                fresh.append(kept.pop())
            self._sorted = (*kept, _sorted(fresh))
            self._loose = set()


def _holds(known: array[int], item: int) -> bool:
    position = bisect_left(known, item)
    return position < len(known) and known[position] == item


def _sorted(arrays: Iterable[array[int]]) -> array[int]:
    """All of their keys, each once."""
    whole = array("Q")
    for each in arrays:
        whole.extend(each)
    keys = np.frombuffer(whole, np.uint64)
    keys.sort()  # in place, so in `whole`
    return array("Q", np.unique(keys).tobytes()) if (keys[1:] == keys[:-1]).any() else whole
