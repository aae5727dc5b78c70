"""The servers of a run: how many requests each gets at a time, and when it gets none. Times are of the monotonic clock."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

FIRST_LIMIT, MOST = 4, 256  # requests at a time under `auto`: at first, and at most
QUICK, SLOWER = 1.0, 3.0  # `auto` grows while answers take less than QUICK seconds, or SLOWER times the fastest answer
SEVERAL = 3  # failed attempts in a row after which a server pauses
BACKOFF, LONGEST_BACKOFF = 0.5, 60.0  # seconds: the first wait before a repetition, and the longest


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled by each, with jitter of half the time."""
    wait = min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(failures - 1, 16))
    return wait * random.uniform(0.5, 1.0)


@dataclass(slots=True, eq=False)
class Server:
    """One server. `limit` is the number of requests that it may get at a time, `fixed` the largest one the user allows."""

    url: str
    fixed: int | None
    limit: float = 0.0
    active: int = 0
    paused_until: float = 0.0
    unreachable: int = 0  # attempts to connect that failed in a row, one counted per pause
    throttled: int = 0  # refusals in a row (429, 503), one counted per pause
    failed: int = 0  # other attempts that failed in a row
    _fastest: float = float("inf")  # seconds
    _halved: float = 0.0
    _grows_fast: bool = True

    def __post_init__(self) -> None:
        self.limit = float(self.fixed or FIRST_LIMIT)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def has_room(self, now: float) -> bool:
        """Whether it may get a request now. One that could not be reached gets one at a time."""
        return now >= self.paused_until and self.active < (1 if self.unreachable else int(self.limit))

    def succeeded(self, seconds: float) -> None:
        """Record an answer that took this long; the limit grows while the server keeps its pace."""
        self.responded()
        self.throttled = 0
        self._fastest = min(self._fastest, seconds)
        if seconds <= max(QUICK, SLOWER * self._fastest):
            grown = self.limit + (1.0 if self._grows_fast else 1.0 / self.limit)
            self.limit = min(grown, float(self.fixed or MOST))

    def reached(self) -> None:
        """Record any response."""
        self.unreachable = 0

    def responded(self) -> None:
        """Record a response that is no fault of the server."""
        self.reached()
        self.failed = 0

    def halve(self, started: float) -> None:
        """Halve the limit because of a request that started then, but once only for all requests of the same time."""
        if started >= self._halved:
            self._halved = time.monotonic()
            self._grows_fast = False
            self.limit = max(1.0, self.limit / 2)

    def throttle(self, started: float, wait: float | None, *, answered: bool) -> None:
        """Record a refusal (429, 503): half as many requests, after `wait` seconds or, if None, a backoff from the second on.

        `answered` means that the server itself refused, and not one before it that does not reach it.
        """
        if answered:
            self.responded()
        self.reached()
        if started >= self._halved:
            self.throttled += 1
        self.halve(started)
        if wait is not None or self.throttled > 1:
            self.pause(backoff(self.throttled) if wait is None else wait)

    def not_reached(self) -> None:
        """Record an attempt to connect that failed; several of the same time count once."""
        if time.monotonic() >= self.paused_until:
            self.unreachable += 1
            self.pause(backoff(self.unreachable))

    def pause(self, seconds: float) -> None:
        self.paused_until = max(self.paused_until, time.monotonic() + seconds)

    def failure(self, *, alone: bool) -> None:
        """Record a failed attempt. A server where several fail in a row pauses, unless there is no other."""
        self.failed += 1
        if self.failed >= SEVERAL and not alone:
            self.pause(backoff(self.failed))


@dataclass(frozen=True, slots=True)
class Servers:
    """All servers of a run."""

    each: Sequence[Server]

    def choose(self, avoided: Server | None) -> Server | None:
        """The least loaded server with room, if possible not the one where the last attempt failed."""
        now = time.monotonic()
        free = [server for server in self.each if server.has_room(now)]
        return min(free, key=lambda server: (server is avoided, server.active / server.limit), default=None)

    def next_room(self) -> float | None:
        """Seconds until a pause ends; None where no server is paused."""
        now = time.monotonic()
        return min((server.paused_until - now for server in self.each if server.paused_until > now), default=None)

    @property
    def room(self) -> int:
        """How many requests all of them may get at a time."""
        return sum(int(server.limit) for server in self.each)
