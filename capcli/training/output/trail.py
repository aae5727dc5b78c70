"""The way a number went, in a few block characters, however many values it had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
LONGEST = 256  # means that are kept; twice as long ones take their place when there are more


class Sparkline:
    """Values as they come, remembered as means of equally many each."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """One more; what is no finite number is passed over."""
        if not math.isfinite(value):
            return
        self._open.append(value)
        if len(self._open) < self._each:
            return
        self._means.append(mean(self._open))
        self._open.clear()
        if len(self._means) == LONGEST:
            self._means = [mean(self._means[at : at + 2]) for at in range(0, LONGEST, 2)]
            self._each *= 2

    def blocks(self, width: int) -> str:
        """The whole way in at most `width` characters; the lower, the smaller. Empty for fewer than two values."""
        count = len(self._means)
        if count < 2 or width < 2:
            return ""
        edges = [count * at // min(width, count) for at in range(min(width, count) + 1)]
        means = [mean(self._means[begin:end]) for begin, end in pairwise(edges)]
        if min(means) > 0:
            means = list(map(math.log, means))  # the steep start would flatten all else
        low, high = min(means), max(means)
        step = (high - low) / (len(BLOCKS) - 1) or 1.0
        return "".join(BLOCKS[round((value - low) / step)] for value in means)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
