"""The eight bytes by which a run remembers a name, and a set of them that stays small."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

_LOOSE = 1 << 15  # keys held in a set before they join the array: some 3 MB


def key(raw: bytes) -> int:
    """64 bits of the name's hash: among a million names two are alike once in thirty million runs."""
    return int.from_bytes(blake2b(raw, digest_size=8).digest(), "big")


class Keys:
    """A set of keys that takes eight bytes for each."""

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._loose: set[int] = set()
        self._sorted = _unique(np.frombuffer(array("Q", keys), np.uint64))

    def __contains__(self, item: int) -> bool:
        if item in self._loose:
            return True
        known = self._sorted  # another thread may be adding
        position = bisect_left(known, item)
        return position < len(known) and known[position] == item

    def __len__(self) -> int:
        return len(self._sorted) + len(self._loose)

    def add(self, item: int) -> None:
        if item in self:
            return
        self._loose.add(item)
        if len(self._loose) >= _LOOSE:
            fresh = np.fromiter(self._loose, np.uint64, len(self._loose))
            self._sorted = _unique(np.concatenate([np.frombuffer(self._sorted, np.uint64), fresh]))
            self._loose = set()


def _unique(keys: npt.NDArray[np.uint64]) -> array[int]:
    return array("Q", np.unique(keys).tobytes())
