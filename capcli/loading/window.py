"""The window: entries that were read and whose results were not taken yet, bounded, in the entries' order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from capcli.records import Entry, Failure, Loaded

# Bytes of decoded pixels in the window above which only the first image, which all others wait for, is started.
_MAX_BYTES = 256 << 20


@dataclass(slots=True, eq=False)
class Task:
    """One entry in the window, and its result once it has one."""

    entry: Entry
    number: int
    result: Loaded | Failure | None = None


class Window:
    """Shared by three threads: one feeds entries, one decodes them, one takes the results in the entries' order.

    `wake` is called, with the lock held, when `next_task` returned None before and there is now a task to start.
    """

    wake: Callable[[], None]

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()  # re-entrant: the garbage collector may close a window in any thread
        self._changed = threading.Condition(self._lock)  # for the thread that takes
        self._room = threading.Condition(self._lock)  # for the thread that feeds
        self.wake = self._changed.notify
        self._tasks: deque[Task] = deque()  # in the entries' order
        self._to_start: deque[Task] = deque()
        self._bytes = 0  # of the results in the window
        self._wants_task = False  # `next_task` returned None
        self._all_read = False
        self._source_error: BaseException | None = None
        self._error: BaseException | None = None
        self._closed = False

    def feed(self, entries: Iterable[Entry]) -> None:
        """Add entries as there is room, until they or the window end; `take` raises their error after their results."""
        error: BaseException | None = None
        try:
            remaining = enumerate(entries)
            while self._wait_for_room() and (numbered := next(remaining, None)):
                number, entry = numbered
                self._add(Task(entry, number))
        except BaseException as raised:  # the thread that takes raises it
            error = raised
        with self._lock:
            self._source_error = error
            self._all_read = True
            self._changed.notify()

    def _wait_for_room(self) -> bool:
        with self._lock:
            self._room.wait_for(lambda: self._closed or len(self._tasks) < self._limit)
            return not self._closed

    def _add(self, task: Task) -> None:
        with self._lock:
            self._tasks.append(task)
            if task.entry.failure is not None:
                self.finish(task, task.entry.failure)
                return
            self._to_start.append(task)
            self._wake_if_startable()

    def _wake_if_startable(self) -> None:
        if self._wants_task and self._may_start() and not self._closed:
            self._wants_task = False
            self.wake()

    def _may_start(self) -> bool:
        """Whether to start another. The first in the window always may, so that waiting results can never block it."""
        return bool(self._to_start) and (self._bytes < _MAX_BYTES or self._to_start[0] is self._tasks[0])

    def next_task(self, timeout: float | None = 0) -> Task | None:
        """The next task; None if there is none within `timeout` seconds, or if too many bytes are waiting."""
        with self._lock:
            self._wants_task = not self._may_start()
            if self._wants_task and timeout != 0:
                self._changed.wait_for(lambda: self._may_start() or self._first_is_ready() or self._over(), timeout)
            return self._to_start.popleft() if self._may_start() else None

    def put_back(self, task: Task) -> None:
        """Return `task`, started but not finished, to its position in the queue of `next_task`."""
        with self._lock:
            self._to_start = deque(sorted([*self._to_start, task], key=lambda task: task.number))

    def finish(self, task: Task, result: Loaded | Failure) -> None:
        """Store the result of `task`."""
        with self._lock:
            task.result = result
            self._bytes += _size(result)
            if task is self._tasks[0]:
                self._changed.notify()

    def take(self, timeout: float | None) -> Loaded | Failure | None:
        """The next result; None if it is not ready in time (None: no limit) or there are no more.

        Raises the error given to `fail`; and the error of the entries, once, after the results before it.
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
        return bool(self._tasks) and self._tasks[0].result is not None

    def _pop(self) -> Loaded | Failure | None:
        result = self._tasks.popleft().result
        if result is not None:
            self._bytes -= _size(result)
        self._room.notify()
        self._wake_if_startable()
        return result

    def _ended(self) -> bool:
        return self._all_read and not self._tasks

    def _over(self) -> bool:
        return self._closed or self._error is not None or self._ended()

    @property
    def done(self) -> bool:
        """Whether `take` has neither results nor an error left: all was taken, or the window is closed."""
        with self._lock:
            return self._closed or (self._ended() and self._source_error is None and self._error is None)

    @property
    def closed(self) -> bool:
        return self._closed

    def fail(self, error: BaseException) -> None:
        """Stop decoding: `take` raises `error` once the results that are ready in order are taken."""
        with self._lock:
            self._error = error
            self._changed.notify()

    def close(self) -> None:
        """Close the window, which ends the wait of all three threads."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            self._room.notify_all()
            self.wake()


def _size(result: Loaded | Failure) -> int:
    return result.pixels.nbytes if isinstance(result, Loaded) else 0
