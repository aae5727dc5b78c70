"""A runtime and a feed without a model. Every image has its own expected caption, so an exchanged image is noticed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from capcli.decoding.loop import Job
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes

VOCABULARY, END, START = 23, 22, 0
BROKEN = 255  # the number of an image whose memory is not finite
WAVERING = 254  # the number of an image whose logits are not finite from its second step on


def image(number: int) -> np.ndarray:
    return np.full((2, 2, 3), number, np.uint8)


def settings(most: int = 6, beams: int = 1) -> Settings:
    return Settings((START,), (END,), most, num_beams=beams, length_penalty=0.0)


def next_token(number: int, position: int, last: int) -> int:
    """The token after `last` for the image of this number, which ends after number % 5 tokens."""
    return END if position >= number % 5 else 1 + (number * 5 + position * 7 + last * 3) % 21


def caption(number: int, most: int = 6) -> tuple[int, ...]:
    tokens = [START]
    while tokens[-1] != END and len(tokens) <= most:
        tokens.append(next_token(number, len(tokens) - 1, tokens[-1]))
    return tuple(tokens[1:])


class Chunk:
    """An encoded chunk: the images' numbers, ready after `calls` calls of `ready`."""

    def __init__(self, numbers: Sequence[int], calls: int) -> None:
        self.numbers, self._calls = numbers, calls

    def ready(self) -> bool:
        self._calls -= 1
        return self._calls < 0


class FakeRuntime:
    """Gives logits for `next_token`. `fails(n)`: whether the nth call runs out of memory.

    `slow`: after how many calls of `ready` each chunk is ready, where encoding runs beside the steps; None: it does not.
    """

    def __init__(
        self,
        lag: int = 0,
        fails: Callable[[int], bool] = lambda _: False,
        slow: Sequence[int] | None = None,
    ) -> None:
        self.device, self.lag, self.fails = torch.device("cpu"), lag, fails
        self.ahead, self._slow = slow is not None, list(slow or ())
        self.encoded = 0
        self.calls, self.admitted, self.steps = 0, [], 0
        self.images: dict[int, int] = {}
        self.before_step: Callable[[], None] = lambda: None

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:  # noqa: ARG002
        return shapes.halved()

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        self.shapes, self.settings = shapes, settings
        self.images = {}
        self.call()

    def encode(self, images: Sequence[np.ndarray], encoder_ids: Sequence[Sequence[int]]) -> Chunk:
        pixels = np.stack(images)
        self.call()
        assert pixels.shape == (self.shapes.chunk, 2, 2, 3), "encode has one shape"
        assert len(encoder_ids) == len(pixels)
        self.encoded += 1
        return Chunk(pixels[:, 0, 0, 0].tolist(), self._slow.pop(0) if self._slow else 0)

    def admit(self, encoded: Chunk, slots: Sequence[int]) -> torch.Tensor:
        self.call()
        numbers = encoded.numbers[: len(slots)]
        self.admitted.append(numbers)
        self.images |= dict(zip(slots, numbers, strict=True))
        return torch.tensor([number != BROKEN for number in numbers])

    def step(self, tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        self.call()
        self.before_step()
        self.steps += 1
        slots, rows = self.shapes.slots, self.settings.rows
        assert tokens.shape == (slots, rows)
        assert visible.shape == (slots, rows, self.settings.entries)
        logits = torch.zeros(slots, rows, VOCABULARY)
        for slot, number in self.images.items():
            for row in range(rows):
                logits[slot, row, next_token(number, int(position[slot]), int(tokens[slot, row]))] = 20.0
            if number == BROKEN or (number == WAVERING and position[slot] > 0):
                logits[slot] = torch.nan
        return logits

    def call(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise torch.OutOfMemoryError("CUDA out of memory")


class Trickle:
    """A feed that gives jobs in portions: each call without a wait gives the next of `portions` jobs, then as many as wanted."""

    def __init__(self, jobs: Sequence[Job], portions: Sequence[int] = ()) -> None:
        self._jobs, self._portions = list(jobs), list(portions)
        self.ended = False
        self.waits: list[float | None] = []
        self.taken = 0
        self.on_take: Callable[[float | None], None] = lambda _: None

    def take(self, most: int, wait: float | None) -> list[Job]:
        assert not self.ended, "called after the end"
        assert most > 0
        self.on_take(wait)
        self.waits.append(wait)
        portion = self._portions.pop(0) if self._portions else most
        count = min(most, max(portion, 1) if wait is None else portion)
        jobs, self._jobs = self._jobs[:count], self._jobs[count:]
        self.ended = count > len(jobs)
        self.taken += len(jobs)
        return jobs


class Clock(SimpleNamespace):
    """Replaces the module `time`: time passes only when `now` is set."""

    now: float = 1024.0

    def monotonic(self) -> float:
        return self.now
