"""The window that restores the order: what is listed and not yet handed on, and never more than its limit."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from capcli.records import Entry, Failure, Loaded

_ROOMY = 256 << 20  # bytes of decoded pixels past which only the image that all others wait for is begun


@dataclass(slots=True, eq=False)
class Ticket:
    """One entry on its way through the window."""

    entry: Entry
    number: int
    result: Loaded | Failure | None = None


class Window:
    """Three threads meet here: one feeds entries, one has them decoded, one takes the results in the entries' order.

    `wake` is called, holding the lock, when `next_task` said None and there is something to begin now.
    """

    wake: Callable[[], None]

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()  # re-entrant: the garbage collector may close a window anywhere
        self._changed = threading.Condition(self._lock)  # what the taker waits for
        self._room = threading.Condition(self._lock)  # what the feeder waits for
        self.wake = self._changed.notify
        self._waiting: deque[Ticket] = deque()  # in the entries' order
        self._to_begin: deque[Ticket] = deque()
        self._bytes = 0  # of the results that wait
        self._hungry = False
        self._listed = False  # no more entries will come
        self._source_error: BaseException | None = None
        self._error: BaseException | None = None
        self._closed = False

    def feed(self, entries: Iterable[Entry]) -> None:
        """Put entries in as there is room, until they end or the window closes; an error of theirs comes after them."""
        error: BaseException | None = None
        try:
            remaining = enumerate(entries)
            while self._wait_for_room() and (numbered := next(remaining, None)):
                number, entry = numbered
                self._add(Ticket(entry, number))
        except BaseException as raised:  # it belongs to the thread that takes
            error = raised
        with self._lock:
            self._source_error = error
            self._listed = True
            self._changed.notify()

    def _wait_for_room(self) -> bool:
        with self._lock:
            self._room.wait_for(lambda: self._closed or len(self._waiting) < self._limit)
            return not self._closed

    def _add(self, ticket: Ticket) -> None:
        with self._lock:
            self._waiting.append(ticket)
            self._to_begin.append(ticket)
            self._rouse()

    def _rouse(self) -> None:
        if self._hungry and self._may_begin() and not self._closed:
            self._hungry = False
            self.wake()

    def _may_begin(self) -> bool:
        """Whether to begin another: the first of the window always, so that much waiting can never block it."""
        return bool(self._to_begin) and (self._bytes < _ROOMY or self._to_begin[0] is self._waiting[0])

    def next_task(self, timeout: float | None = 0) -> Ticket | None:
        """The next to be decoded; None if there is none, or too much waits already, for `timeout` seconds."""
        with self._lock:
            self._hungry = not self._may_begin()
            if self._hungry and timeout != 0:
                self._changed.wait_for(lambda: self._may_begin() or self._over(), timeout)
            return self._to_begin.popleft() if self._may_begin() else None

    def put_back(self, ticket: Ticket) -> None:
        """`ticket` was begun and not finished: it is to be begun again, in its turn."""
        with self._lock:
            self._to_begin = deque(sorted([*self._to_begin, ticket], key=lambda ticket: ticket.number))

    def settle(self, ticket: Ticket, result: Loaded | Failure) -> None:
        """`ticket` is decoded, or failed."""
        with self._lock:
            ticket.result = result
            self._bytes += _size(result)
            if ticket is self._waiting[0]:
                self._changed.notify()

    def take(self, timeout: float | None) -> Loaded | Failure | None:
        """The next result; None if it is not there in time (None: wait for ever) or nothing more will come.

        Raises what `fail` was given; what the entries raised, once, after the results before it.
        """
        with self._lock:
            self._changed.wait_for(lambda: self._first_is_ready() or self._over(), timeout)
            if self._first_is_ready():
                return self._pop()
            error = self._error
            if error is None and self._ended():
                error, self._source_error = self._source_error, None
        if error is not None:
            raise error
        return None

    def _first_is_ready(self) -> bool:
        return bool(self._waiting) and self._waiting[0].result is not None

    def _pop(self) -> Loaded | Failure | None:
        result = self._waiting.popleft().result
        if result is not None:
            self._bytes -= _size(result)
        self._room.notify()
        self._rouse()
        return result

    def _ended(self) -> bool:
        return self._listed and not self._waiting

    def _over(self) -> bool:
        return self._closed or self._error is not None or self._ended()

    @property
    def done(self) -> bool:
        """Whether nothing more will come, no error either: all was taken, or the window is closed."""
        with self._lock:
            return self._closed or (self._ended() and self._source_error is None and self._error is None)

    @property
    def closed(self) -> bool:
        return self._closed

    def fail(self, error: BaseException) -> None:
        """Nothing more can be decoded: whoever takes gets `error`, once the results before the gap are taken."""
        with self._lock:
            self._error = error
            self._changed.notify()

    def close(self) -> None:
        """Let the three threads go."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            self._room.notify_all()
            self.wake()


def _size(result: Loaded | Failure) -> int:
    return result.pixels.nbytes if isinstance(result, Loaded) else 0
