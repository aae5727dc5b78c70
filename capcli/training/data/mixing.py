"""Several tasks in one run: their pairs as one data set, sampled by weight and in an order determined by the seed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Dataset, Sampler

from capcli.training.data.pairs import Pair, Pairs


class TaskMixture(Dataset[Pair]):
    """The pairs of several tasks, one task after the other.

    An index of at least the length is a repeated draw: index + n * length is draw number n of the pair, which decides what a
    masked caption masks.
    """

    def __init__(self, parts: Sequence[Pairs], weights: Sequence[float]) -> None:
        self.parts, self.weights = list(parts), list(weights)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def count_truncated(self, end: int) -> int:
        """How many captions are longer than the labels may be, and so lack the `end` token."""
        return sum(part.count_truncated(end) for part in self.parts)

    def __getitem__(self, index: int) -> Pair:
        draw, at = divmod(int(index), len(self))
        part = bisect_right(self._ends, at)
        return self.parts[part].pair(at - (self._ends[part] - len(self.parts[part])), draw)


class TaskSampler(Sampler[int]):
    """Indices of a TaskMixture for one epoch: as many as it has pairs, each task in proportion to its weight.

    Within a task no pair is repeated before all have been drawn once. Epochs differ: transformers' Trainer calls
    `set_epoch`, also on resumption.
    """

    def __init__(self, mixture: TaskMixture, seed: int) -> None:
        self._sizes, self._weights = [len(part) for part in mixture.parts], mixture.weights
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self._epoch))
        total, start = len(self), 0
        indices = []
        for size, count in zip(self._sizes, shares(total, self._weights), strict=True):
            passes = -(-count // size)
            order = np.concatenate([random.permutation(size) for _ in range(passes)] or [np.empty(0, np.int64)])[:count]
            draw = self._epoch * passes + np.arange(count) // size
            indices.append(start + order + total * draw)
            start += size
        yield from random.permutation(np.concatenate(indices)).tolist()


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to the weights; the parts add up to it."""
    sums = list(accumulate(weight / max(weights) for weight in weights))  # scaled, so that the sum does not overflow
    ends = [round(total * part / sums[-1]) for part in sums]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
