"""Several decode loops beside each other, each in a thread: cores of a CPU get more done apart than together on one step."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Self

import torch

from capcli.decoding.loop import LINGER, Feed, Finished, Job, Runtime, Shapes, decode_steps
from capcli.decoding.settings import Settings
from capcli.interrupts import Interrupts

TURN = 0.02  # seconds for which the caller's thread waits for images, or for captions, before it looks for the other
Said = list[Finished] | Shapes | BaseException | None  # what ended, fewer slots, what went wrong, that the loop is over


def decode_in_parallel(
    feed: Feed,
    runtimes: Sequence[Runtime],
    settings: Settings,
    shapes: Shapes,
    shrunk: Callable[[Shapes], None] = lambda _: None,
) -> Iterator[list[Finished]]:
    """`decode_steps` in a loop for each of `runtimes`; they share the feed and PyTorch's threads.

    Loops only encode and step: the feed is asked, and `shrunk` told, in the thread that takes what this yields. Raises what a
    loop raises, once all have stopped.
    """
    if len(runtimes) == 1:
        yield from decode_steps(feed, runtimes[0], settings, shapes, shrunk)
        return
    jobs = SharedFeed(shapes.chunk)
    with Loops(jobs, runtimes, settings, shapes) as loops:
        while loops.running:
            drawing = jobs.room > 0 and not feed.ended
            if drawing:
                jobs.put(feed.take(jobs.room, TURN))
            if feed.ended:
                jobs.close()
            yield loops.done(0.0 if drawing else TURN, shrunk)


class Loops:
    """The loops' threads: they begin as this is entered, and when it is left they stop after the step that they are in."""

    def __init__(self, jobs: SharedFeed, runtimes: Sequence[Runtime], settings: Settings, shapes: Shapes) -> None:
        self._jobs, self._settings, self._shapes = jobs, settings, shapes
        self._said: SimpleQueue[Said] = SimpleQueue()
        self._halted = threading.Event()
        self._threads_before = torch.get_num_threads()
        self._threads = max(1, self._threads_before // len(runtimes))
        self._loops = [threading.Thread(target=self._loop, args=(each,), daemon=True) for each in runtimes]
        self.running = len(self._loops)

    def __enter__(self) -> Self:
        try:
            for each in self._loops:
                each.start()
        except RuntimeError:  # the system has no more threads
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._halted.set()
        self._jobs.close()
        # An impatient Ctrl-C must not end the interpreter under threads that compute: it would abort.
        with Interrupts(quiet=True, grace=math.inf):
            for each in self._loops:
                if each.ident is not None:
                    each.join()
        torch.set_num_threads(self._threads_before)

    def done(self, wait: float, shrunk: Callable[[Shapes], None]) -> list[Finished]:
        """What has ended since; waits so many seconds for something to be said."""
        done: list[Finished] = []
        for what in heard(self._said, wait):
            if what is None:
                self.running -= 1
            elif isinstance(what, Shapes):
                shrunk(what)
            elif isinstance(what, BaseException):
                raise what
            else:
                done += what
        return done

    def _loop(self, runtime: Runtime) -> None:
        torch.set_num_threads(self._threads)  # of this thread: each has its own number
        try:
            for ended in decode_steps(self._jobs, runtime, self._settings, self._shapes, self._said.put):
                if self._halted.is_set():
                    break
                self._said.put(ended)
            self._said.put(None)
        except BaseException as error:  # for the thread that waits
            self._said.put(error)


def heard(said: SimpleQueue[Said], wait: float) -> Iterator[Said]:
    """All that has been said; waits so many seconds for the first of it."""
    try:
        yield said.get(timeout=wait) if wait else said.get_nowait()
        while True:
            yield said.get_nowait()
    except Empty:
        pass


class SharedFeed:
    """The feed of several loops: jobs that another thread has drawn, a chunk of them at most.

    A loop gets as many as it asks for, or none: fewer only when no others came for LINGER seconds, or will come. So the loops
    fill one chunk after the other, instead of one each at the same time.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._jobs: deque[Job] = deque()
        self._since = 0.0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def ended(self) -> bool:
        return self._closed and not self._jobs

    @property
    def room(self) -> int:
        return self._chunk - len(self._jobs)

    def put(self, jobs: Sequence[Job]) -> None:
        """Adds what has come, be it nothing: who waits hears that time has passed."""
        with self._changed:
            if jobs:
                self._since = time.monotonic()
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
        alone = bool(self._jobs) and time.monotonic() - self._since >= LINGER
        return len(self._jobs) >= most or alone or self._closed
