"""Several tasks in one run: their pairs as one data set, drawn by weight, anew each epoch and the same for the same seed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from torch.utils.data import Dataset, Sampler

from capcli.training.data.pairs import Pair, Pairs


class TaskMixture(Dataset[Pair]):
    """The pairs of several tasks, one after the other. Beyond its length it begins again: index + draw * length is a pair as it
    is drawn for another time, which masked captions heed.
    """

    def __init__(self, parts: Sequence[Pairs], weights: Sequence[float]) -> None:
        self.parts, self.weights = list(parts), list(weights)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def cut(self, end: int) -> int:
        """How many captions do not end: they were longer than the labels may be."""
        return sum(part.cut(end) for part in self.parts)

    def __getitem__(self, index: int) -> Pair:
        draw, at = divmod(int(index), len(self))
        part = bisect_right(self._ends, at)
        return self.parts[part].pair(at - (self._ends[part] - len(self.parts[part])), draw)


class TaskSampler(Sampler[int]):
    """An epoch of as many draws as there are pairs, each task as often as its weight says, none of its pairs twice as often
    as another before all have come. Epochs differ, by `set_epoch`, which transformers' Trainer calls, also when it goes on.
    """

    def __init__(self, mixed: TaskMixture, seed: int) -> None:
        self._sizes, self._weights = [len(part) for part in mixed.parts], mixed.weights
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self._seed, self._epoch))
        whole, start = len(self), 0
        serials = []
        for size, count in zip(self._sizes, shares(whole, self._weights), strict=True):
            passes = -(-count // size)
            order = np.concatenate([draw.permutation(size) for _ in range(passes)] or [np.empty(0, np.int64)])[:count]
            nth = self._epoch * passes + np.arange(count) // size
            serials.append(start + order + whole * nth)
            start += size
        yield from draw.permutation(np.concatenate(serials)).tolist()


def shares(whole: int, weights: Sequence[float]) -> list[int]:
    """`whole` in parts by weight."""
    parts = list(accumulate(weight / max(weights) for weight in weights))  # whose sum is finite whatever they are
    ends = [round(whole * part / parts[-1]) for part in parts]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
