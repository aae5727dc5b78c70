"""A runtime and a feed without a model: every image has one right caption, so that a mix-up shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from capcli.decoding.loop import Job
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes

VOCABULARY, END, START = 23, 22, 0
BROKEN = 255  # an image of this number makes no finite memory
WAVERING = 254  # one of this number has a finite memory, and no finite logits from its second step on


def image(number: int) -> np.ndarray:
    return np.full((2, 2, 3), number, np.uint8)


def settings(most: int = 6, beams: int = 1) -> Settings:
    return Settings((START,), (END,), most, num_beams=beams, length_penalty=0.0)


def said(number: int, position: int, last: int) -> int:
    """What the image of this number says next; it ends after its number of tokens, modulo five."""
    return END if position >= number % 5 else 1 + (number * 5 + position * 7 + last * 3) % 21


def caption(number: int, most: int = 6) -> tuple[int, ...]:
    tokens = [START]
    while tokens[-1] != END and len(tokens) <= most:
        tokens.append(said(number, len(tokens) - 1, tokens[-1]))
    return tuple(tokens[1:])


class Chunk:
    """The numbers of images that are ready once asked so often."""

    def __init__(self, numbers: Sequence[int], asked: int) -> None:
        self.numbers, self._asked = numbers, asked

    def ready(self) -> bool:
        self._asked -= 1
        return self._asked < 0


class FakeRuntime:
    """Says what an image's number, the position and the last token demand. `fails(call)` says which calls run out of memory.

    `slow` says how often each chunk in turn is asked for until it is ready, where encoding runs beside the steps; None: it
    does not.
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
        self.seated: dict[int, int] = {}
        self.before_step: Callable[[], None] = lambda: None

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        return turn

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:  # noqa: ARG002
        return shapes.halved()

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        self.shapes, self.settings = shapes, settings
        self.seated = {}
        self.call()

    def encode(self, pixels: np.ndarray, encoder_ids: Sequence[Sequence[int]]) -> Chunk:
        self.call()
        assert pixels.shape == (self.shapes.chunk, 2, 2, 3), "encode has one shape"
        assert len(encoder_ids) == len(pixels)
        self.encoded += 1
        return Chunk(pixels[:, 0, 0, 0].tolist(), self._slow.pop(0) if self._slow else 0)

    def admit(self, encoded: Chunk, seats: Sequence[int]) -> torch.Tensor:
        self.call()
        numbers = encoded.numbers[: len(seats)]
        self.admitted.append(numbers)
        self.seated |= dict(zip(seats, numbers, strict=True))
        return torch.tensor([number != BROKEN for number in numbers])

    def step(self, tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        self.call()
        self.before_step()
        self.steps += 1
        slots, rows = self.shapes.slots, self.settings.rows
        assert tokens.shape == (slots, rows)
        assert visible.shape == (slots, rows, self.settings.entries)
        logits = torch.zeros(slots, rows, VOCABULARY)
        for seat, number in self.seated.items():
            for row in range(rows):
                logits[seat, row, said(number, int(position[seat]), int(tokens[seat, row]))] = 20.0
            if number == BROKEN or (number == WAVERING and position[seat] > 0):
                logits[seat] = torch.nan
        return logits

    def call(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise torch.OutOfMemoryError("CUDA out of memory")


class Trickle:
    """Gives jobs in portions: each call that need not wait gives the next of `portions` (0: none are there yet), then all."""

    def __init__(self, jobs: Sequence[Job], portions: Sequence[int] = ()) -> None:
        self._jobs, self._portions = list(jobs), list(portions)
        self.ended = False
        self.waits: list[float | None] = []
        self.taken = 0
        self.on_take: Callable[[float | None], None] = lambda _: None

    def take(self, most: int, wait: float | None) -> list[Job]:
        assert not self.ended, "asked after the end"
        assert most > 0
        self.on_take(wait)
        self.waits.append(wait)
        portion = self._portions.pop(0) if self._portions else most
        count = min(most, max(portion, 1) if wait is None else portion)
        given, self._jobs = self._jobs[:count], self._jobs[count:]
        self.ended = count > len(given)
        self.taken += len(given)
        return given


class Clock(SimpleNamespace):
    """Stands in for the module `time`: time passes only when someone says so."""

    now: float = 1024.0

    def monotonic(self) -> float:
        return self.now
