"""The decode loop: images take free slots, every step says one token for all of them, and who has ended makes room.

It knows nothing of files, text or models: images are arrays with a key, a runtime admits and steps, captions are ids.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from capcli.decoding.search import Hypothesis, make_search
from capcli.decoding.settings import Settings
from capcli.decoding.slots import Slots
from capcli.errors import CapcliError

LINGER = 0.05  # seconds without another image after which those that do not fill a chunk go without company


@dataclass(frozen=True, slots=True)
class Shapes:
    """The fixed shapes of a run: `slots` S in the running batch, images encoded `chunk` E at a time, in `loops` of the kind.

    With the rows and the entries of the settings they fix every tensor of the run, so no caption depends on its neighbours.
    """

    slots: int
    chunk: int
    loops: int = 1

    @classmethod
    def of(cls, slots: int) -> Shapes:
        """Slots refill a quarter at a time: bigger chunks encode no faster, and leave seats empty for longer."""
        return cls(slots, min(slots, max(4, slots // 4)))

    def shared_by(self, count: int) -> Shapes:
        """For `count` images: no more slots than are full each time, and chunks of which the last is full, as near as can be.

        An encoding costs a whole chunk and a step all slots, however few are in them.
        """
        rounds = max(1, math.ceil(count / self.slots))
        each = max(1, math.ceil(count / rounds))
        least = math.ceil(each / 4)
        chunk = min(range(least, max(least, min(self.chunk, each)) + 1), key=lambda e: (math.ceil(count / e) * e, -e))
        return Shapes(min(self.slots, math.ceil(each / chunk) * chunk), chunk)

    def halved(self) -> Shapes:
        slots = max(1, self.slots // 2)
        return replace(self, slots=slots, chunk=min(self.chunk, slots))


@dataclass(frozen=True, slots=True)
class Job:
    """One image to caption: `pixels` uint8 [height, width, 3], `key` for its sampling noise, `tag` the caller's own.

    `encoder_ids` are the ids that its encoder reads beside it, as many for every image of a run; none: the settings' own.
    """

    tag: Any
    pixels: npt.NDArray[np.uint8]
    key: int = 0
    encoder_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """A captioned job; no hypotheses when what the encoder made of it is not finite."""

    tag: Any
    hypotheses: list[Hypothesis]


class Feed(Protocol):
    """Where jobs come from."""

    @property
    def ended(self) -> bool:
        """Whether no more will come."""

    def take(self, most: int, wait: float | None) -> Sequence[Job]:
        """At most `most` jobs, those there now; waits `wait` seconds (None: for ever) for the first. Empty when none came."""


class EncodedImages(Protocol):
    """What a runtime's encode makes of a chunk."""

    def ready(self) -> bool:
        """Whether it is there, or still under way beside the steps."""


class Runtime(Protocol):
    """What executes encode and step, with buffers of its own for `slots` slots."""

    device: torch.device
    lag: int  # steps after which the finished flags are read
    ahead: bool  # whether it encodes beside its steps, so that a chunk is best begun before there are seats for it

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        """Makes room for a run; forgets any earlier one."""

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:
        """About half the slots, for less memory; `shapes` themselves where there is nothing smaller."""

    def encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Sequence[Sequence[int]]) -> Any:
        """Begins to encode `pixels` [E, h, w, 3]; gives an Encoded, which `admit` takes.

        `encoder_ids` are E rows of as many ids, none where the encoder reads none; an id below 0 is no word.
        """

    def admit(self, encoded: Any, seats: Sequence[int]) -> torch.Tensor:
        """Puts the first len(seats) images of a chunk into those slots, when it is ready. bool [len(seats)]: all finite.

        Nothing stays of who sat there before.
        """

    def step(self, tokens: torch.Tensor, position: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """One token for every row: tokens [S, R], position [S], visible [S, R, P + R*T] -> logits [S, R, V].

        They are the caller's until the next step, whose logits may lie in the same place.
        """

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        """What does `turn` again and again: itself, or a recording of it. Its tensors stay where they are."""


class IterableFeed:
    """A feed over jobs that are all there."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = iter(jobs)
        self.ended = False

    def take(self, most: int, wait: float | None) -> Sequence[Job]:  # noqa: ARG002
        taken = list(islice(self._jobs, most))
        self.ended = len(taken) < most
        return taken


def decode(
    feed: Feed, runtime: Runtime, settings: Settings, shapes: Shapes, shrunk: Callable[[Shapes], None] = lambda _: None
) -> Iterator[Finished]:
    """Captions everything `feed` gives, in the order in which captions end; errors as `decode_steps`."""
    return chain.from_iterable(decode_steps(feed, runtime, settings, shapes, shrunk))


def decode_steps(
    feed: Feed, runtime: Runtime, settings: Settings, shapes: Shapes, shrunk: Callable[[Shapes], None] = lambda _: None
) -> Iterator[list[Finished]]:
    """`decode`, step by step: what ended with each; nothing, often, also where the feed woke up without a job.

    When the device runs out of memory, what was under way starts again with half the slots, and `shrunk` is told the new shapes.
    Raises CapcliError when not even the fewest slots fit.
    """
    waiting: deque[Job] = deque()
    while True:
        run = None
        try:
            runtime.allocate(shapes, settings)
            run = Batch(feed, runtime, settings, shapes, waiting)
            yield from run.captions()
            return
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            fewer = runtime.fewer(shapes, settings)
            if fewer.slots >= shapes.slots:
                least = "one image fits" if shapes.slots == 1 else f"{shapes.slots} images at a time fit"
                raise CapcliError(f"not even {least} the device's memory: {error}") from error
            if run is not None:
                waiting.extendleft(reversed([*run.slots.items, *run.coming]))
            shapes = fewer
        shrunk(shapes)


def out_of_memory(error: Exception) -> bool:
    """Whether this is one of the ways in which torch says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    return any(sign in str(error) for sign in signs)


class Batch:
    """The running batch of fixed shapes."""

    def __init__(self, feed: Feed, runtime: Runtime, settings: Settings, shapes: Shapes, waiting: deque[Job]) -> None:
        self.feed, self.runtime, self.shapes, self.waiting = feed, runtime, shapes, waiting
        self.coming: list[Job] = []  # the chunk that is encoded but not seated
        self.encoded: EncodedImages | None = None
        self.encoder_ids = settings.encoder_ids
        self.slots: Slots[Job] = Slots(shapes.slots)
        self.search = make_search(settings, shapes.slots, runtime.device)
        self.readings: deque[tuple[int, torch.Tensor, torch.Tensor, Any]] = deque()
        self.broken = torch.zeros(shapes.slots, dtype=torch.bool, device=runtime.device)
        self.since = 0.0
        self.turn = runtime.repeated(self.say)

    def captions(self) -> Iterator[list[Finished]]:
        while True:
            done: list[Finished] = []
            with torch.inference_mode():  # never across a yield: who takes the captions may be training
                if self.slots.busy or self.coming or self.waiting or self.fetch(wait=None):
                    self.fill()
                    self.step()
                    done = self.retire()
                elif self.feed.ended:
                    return
            yield done

    def fill(self) -> None:
        """Seats what has come. Something is seated then, for there is somebody seated or waiting before."""
        while True:
            if not self.coming and (self.slots.free or self.runtime.ahead) and self.fetch(wait=0):
                self.begin()
            if self.encoded and self.slots.free >= len(self.coming) and (self.encoded.ready() or not self.slots.busy):
                self.seat(self.encoded)
            elif self.slots.busy:
                break
            else:
                self.fetch(wait=LINGER)

    def begin(self) -> None:
        """Has those waiting encoded.

        That costs a whole chunk however few are in it, so they wait for company while it comes, then for seats for all, but for
        those only where encoding does not hold up the steps.
        """
        most = min(self.shapes.chunk, len(self.waiting))
        complete = most == self.shapes.chunk or self.feed.ended or time.monotonic() - self.since >= LINGER
        if complete and (self.runtime.ahead or self.slots.free >= most):
            self.coming = [self.waiting.popleft() for _ in range(most)]
            full = [*self.coming, *[self.coming[0]] * (self.shapes.chunk - most)]
            encoder_ids = [job.encoder_ids or self.encoder_ids for job in full]
            self.encoded = self.runtime.encode(np.stack([job.pixels for job in full]), encoder_ids)

    def fetch(self, wait: float | None) -> bool:
        """Adds what has come to those waiting, a chunk at most; says whether anyone waits."""
        want = self.shapes.chunk - len(self.waiting)
        if want > 0 and not self.feed.ended:
            came = self.feed.take(want, wait)
            if came:
                self.since = time.monotonic()
            self.waiting.extend(came)
        return bool(self.waiting)

    def seat(self, encoded: EncodedImages) -> None:
        jobs, self.coming, self.encoded = self.coming, [], None
        seats = self.slots.seat(jobs)
        finite = self.runtime.admit(encoded, seats)
        self.search.seat(seats, [job.key for job in jobs])
        at = torch.tensor(seats, device=self.runtime.device)
        self.broken[at] = ~finite
        self.search.ended[at] = ~finite

    def step(self) -> None:
        self.slots.now += 1
        self.turn()
        self.readings.append((self.slots.now, *self.read()))

    def say(self) -> None:
        """The next token of every row, all on the device: nothing here waits for it."""
        self.search.advance(self.runtime.step(*self.search.inputs()))

    def read(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Copies of the flags on their way to the host, and the event that says they have come (None: they have)."""
        flags, broken = self.search.ended, self.broken
        if flags.device.type != "cuda":
            return flags.clone(), broken.clone(), None
        flags, broken = (x.to("cpu", non_blocking=True) for x in (flags, broken))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return flags, broken, event

    def retire(self) -> list[Finished]:
        """Reads the flags once they are old enough and empties the slots that have ended."""
        if len(self.readings) <= self.runtime.lag:
            return []
        taken, flags, broken, event = self.readings.popleft()
        if event is not None:
            event.synchronize()
        seats = self.slots.finished(flags.tolist(), taken)
        if not seats:
            return []
        hypotheses = self.search.hypotheses(seats)
        done = []
        for seat, found in zip(seats, hypotheses, strict=True):
            sound = not broken[seat] and all(math.isfinite(h.score) for h in found)
            done.append(Finished(self.slots.leave(seat).tag, found if sound else []))
        return done
