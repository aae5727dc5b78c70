"""Between loading and decoding: loaded images become jobs in the order of arrival, and results are put in that order again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from capcli.errors import ImageError
from capcli.records import Caption, Failure, Loaded

if TYPE_CHECKING:  # the endpoint backend imports this module and needs no torch
    from capcli.decoding.loop import Job

Result = Caption | Failure
Deliver = Callable[[int, Result], None]
POLL_SECONDS = 0.2  # how often a feed that waits for an image checks whether to stop


class Arrivals(Protocol):
    """Loaded images as they become available; `capcli.loading.Loading` is one."""

    @property
    def done(self) -> bool:
        """Whether no more images will arrive."""

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:
        """The next image; None when none arrives within `timeout` seconds (None: no limit)."""


class LocalArrivals:
    """Images loaded in this thread when they are taken. `load(index, image)` gives the pixels or raises ImageError."""

    def __init__(self, images: Iterable[Any], load: Callable[[int, Any], Loaded]) -> None:
        self._images: Iterator[tuple[int, Any]] = enumerate(images)
        self._load = load
        self.done = False

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:  # noqa: ARG002
        for index, image in self._images:
            try:
                return self._load(index, image)
            except ImageError as error:
                name = os.fsdecode(image) if isinstance(image, str | os.PathLike) else str(index)
                return Failure(name, error.kind, str(error))
        self.done = True
        return None


class ArrivalFeed:
    """The feed of the decode loop: a job for every image that loaded; failures go to `deliver` at once.

    `make(index, loaded)` builds the job, or raises ImageError for an image that the captioner cannot take. One `take`
    consumes at most as many arrivals as jobs were requested, failures included. This bounds the number of
    results that wait for an earlier caption.
    """

    def __init__(
        self, arrivals: Arrivals, make: Callable[[int, Loaded], Job], deliver: Deliver, stop: Callable[[], bool]
    ) -> None:
        self._arrivals, self._make, self._deliver, self._stop = arrivals, make, deliver, stop
        self._count = 0
        self._stopped = False

    @property
    def ended(self) -> bool:
        """Whether no more jobs will come."""
        return self._stopped or self._arrivals.done

    def take(self, most: int, wait: float | None) -> Sequence[Job]:
        """Up to `most` jobs that are available now; waits at most `wait` seconds (None: no limit) for the first."""
        jobs: list[Job] = []
        taken = 0
        until = None if wait is None else time.monotonic() + wait
        while taken < most and not self.ended:
            if self._stop():
                self._stopped = True
                break
            left = POLL_SECONDS if until is None else max(0.0, min(POLL_SECONDS, until - time.monotonic()))
            arrival = self._arrivals.take(0 if jobs else left)
            if arrival is not None:
                taken += 1
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


class OrderedDelivery:
    """Delivers results in the order of their indices, each as soon as all before it are delivered."""

    def __init__(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._next = 0
        self._early: dict[int, Result] = {}  # at most as many as images are in the batch

    def put(self, index: int, result: Result) -> None:
        self._early[index] = result
        while self._next in self._early:
            self._deliver(self._next, self._early.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Delivers what waits for results that will not come, in order: the run ends early."""
        for index in sorted(self._early):
            self._deliver(index, self._early.pop(index))
