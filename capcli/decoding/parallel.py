"""Several decode loops in parallel, each in a thread: on a CPU this uses the cores better than one step on all of them."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Self

import torch

from capcli.decoding.activity import Activity
from capcli.decoding.loop import LINGER, Feed, Finished, Job, Runtime, decode_steps
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.interrupts import Interrupts

POLL = 0.02  # seconds for which the caller's thread waits for images, or for captions, before it checks for the other
Message = list[Finished] | Shapes | BaseException | None  # finished jobs, smaller shapes, an error, the end of a loop


def decode_in_parallel(
    feed: Feed,
    runtimes: Sequence[Runtime],
    settings: Settings,
    shapes: Shapes,
    shrunk: Callable[[Shapes], None] = lambda _: None,
    activity: Activity | None = None,
) -> Iterator[list[Finished]]:
    """`decode_steps` in one loop per runtime; the loops share the feed and PyTorch's threads.

    The loops only encode and step: `feed` and `shrunk` are called in the caller's thread. Raises the error of a loop, once all
    loops have stopped.
    """
    if len(runtimes) == 1:
        yield from decode_steps(feed, runtimes[0], settings, shapes, shrunk, activity)
        return
    jobs = SharedFeed(shapes.chunk)
    with Loops(jobs, runtimes, settings, shapes, activity or Activity()) as loops:
        while loops.running:
            taking = jobs.room > 0 and not feed.ended
            if taking:
                jobs.put(feed.take(jobs.room, POLL))
            if feed.ended:
                jobs.close()
            yield loops.finished(0.0 if taking else POLL, shrunk)


class Loops:
    """The threads of the loops: started on entry; on exit they stop after their current step.

    While they run, each has its share of PyTorch's threads (`torch.set_num_threads`, which the exit restores), as loops that each
    use every core slow each other down.
    """

    def __init__(
        self,
        jobs: SharedFeed,
        runtimes: Sequence[Runtime],
        settings: Settings,
        shapes: Shapes,
        activity: Activity,
    ) -> None:
        self._jobs, self._settings, self._shapes, self._activity = jobs, settings, shapes, activity
        self._messages: SimpleQueue[Message] = SimpleQueue()
        self._stopped = threading.Event()
        self._threads_before = torch.get_num_threads()
        self._threads = max(1, self._threads_before // len(runtimes))
        self._loops = [threading.Thread(target=self._loop, args=(runtime,), daemon=True) for runtime in runtimes]
        self.running = len(self._loops)

    def __enter__(self) -> Self:
        try:
            for loop in self._loops:
                loop.start()
        except RuntimeError:  # the system has no more threads
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._jobs.close()
        # A second Ctrl-C must not end the interpreter while threads compute: it would abort.
        with Interrupts(quiet=True, grace=math.inf):
            for loop in self._loops:
                if loop.ident is not None:
                    loop.join()
        torch.set_num_threads(self._threads_before)

    def finished(self, wait: float, shrunk: Callable[[Shapes], None]) -> list[Finished]:
        """The jobs that have finished since the last call; waits up to `wait` seconds for a message of any loop."""
        done: list[Finished] = []
        for message in received(self._messages, wait):
            if message is None:
                self.running -= 1
            elif isinstance(message, Shapes):
                shrunk(message)
            elif isinstance(message, BaseException):
                raise message
            else:
                done += message
        return done

    def _loop(self, runtime: Runtime) -> None:
        torch.set_num_threads(self._threads)  # the number is per thread
        try:
            run = (self._jobs, runtime, self._settings, self._shapes, self._messages.put, self._activity)
            for finished in decode_steps(*run):
                if self._stopped.is_set():
                    break
                self._messages.put(finished)
            self._messages.put(None)
        except BaseException as error:  # raised in the caller's thread
            self._messages.put(error)


def received(messages: SimpleQueue[Message], wait: float) -> Iterator[Message]:
    """All messages in the queue; waits up to `wait` seconds for the first."""
    try:
        yield messages.get(timeout=wait) if wait else messages.get_nowait()
        while True:
            yield messages.get_nowait()
    except Empty:
        pass


class SharedFeed:
    """The feed of several loops: up to a chunk of jobs, which another thread adds.

    A loop gets as many jobs as it requests or none; fewer only when no job has come for LINGER seconds or the feed is closed. So
    the loops fill one chunk after the other instead of several at the same time.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._jobs: deque[Job] = deque()
        self._last_arrival = 0.0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def ended(self) -> bool:
        return self._closed and not self._jobs

    @property
    def room(self) -> int:
        """The number of jobs that can be put in."""
        return self._chunk - len(self._jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        """Adds jobs. Call it without jobs too, so that a waiting loop checks the time again."""
        with self._changed:
            if jobs:
                self._last_arrival = time.monotonic()
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, most: int, wait: float | None) -> Sequence[Job]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._due(most), wait):
                return []
            return [self._jobs.popleft() for _ in range(min(most, len(self._jobs)))]

    def _due(self, most: int) -> bool:
        lingered = bool(self._jobs) and time.monotonic() - self._last_arrival >= LINGER
        return len(self._jobs) >= most or lingered or self._closed
