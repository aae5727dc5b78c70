"""Between loading and decoding: images become jobs as they arrive, results go back into the order in which they came."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from capcli.decoding.loop import Job
from capcli.errors import ImageError
from capcli.records import Caption, Failure, Loaded

Result = Caption | Failure
Deliver = Callable[[int, Result], None]
POLL_SECONDS = 0.2  # seconds after which a wait looks whether it should stop


class Arrivals(Protocol):
    """Loaded images as they come; `capcli.loading.Loading` is one."""

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next one; None when none came within `timeout` seconds (None: ever)."""


class LocalArrivals:
    """Arrivals made here and now: `make(index, image)` gives an image's pixels or raises ImageError."""

    def __init__(self, images: Iterable[Any], make: Callable[[int, Any], Loaded]) -> None:
        self._images: Iterator[tuple[int, Any]] = enumerate(images)
        self._make = make
        self.done = False

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:  # noqa: ARG002
        for index, image in self._images:
            try:
                return self._make(index, image)
            except ImageError as error:
                name = os.fsdecode(image) if isinstance(image, str | os.PathLike) else str(index)
                return Failure(name, error.kind, str(error))
        self.done = True
        return None


class ArrivalFeed:
    """The decode loop's feed: a job for every image that loaded well; failures are delivered on the way.

    `make(index, loaded)` makes the job, or raises ImageError for an image that this captioner cannot take. One `take` draws no
    more arrivals than the jobs asked for: failures in their thousands do not run ahead of a caption that is still being made.
    """

    def __init__(
        self, arrivals: Arrivals, make: Callable[[int, Loaded], Job], deliver: Deliver, stop: Callable[[], bool]
    ) -> None:
        self._arrivals, self._make, self._deliver, self._stop = arrivals, make, deliver, stop
        self._count = 0
        self._halted = False

    @property
    def ended(self) -> bool:
        return self._halted or self._arrivals.done

    def take(self, most: int, wait: float | None) -> Sequence[Job]:
        jobs: list[Job] = []
        drawn = 0
        until = None if wait is None else time.monotonic() + wait
        while drawn < most and not self.ended:
            if self._stop():
                self._halted = True
                break
            left = POLL_SECONDS if until is None else max(0.0, min(POLL_SECONDS, until - time.monotonic()))
            arrival = self._arrivals.take(0 if jobs else left)
            if arrival is not None:
                drawn += 1
                jobs += self._job(arrival)
            elif jobs or (until is not None and time.monotonic() >= until):
                break
        return jobs

    def _job(self, arrival: Loaded | Failure) -> list[Job]:
        index, self._count = self._count, self._count + 1
        if isinstance(arrival, Failure):
            self._deliver(index, arrival)
            return []
        try:
            return [self._make(index, arrival)]
        except ImageError as error:
            self._deliver(index, Failure(arrival.name, error.kind, str(error)))
            return []


class Order:
    """Gives results on in the order of their indices; what it holds is bounded by what is under way."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._next = 0
        self._early: dict[int, Result] = {}

    def put(self, index: int, result: Result) -> None:
        self._early[index] = result
        while self._next in self._early:
            self._deliver(self._next, self._early.pop(self._next))
            self._next += 1
