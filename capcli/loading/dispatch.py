"""Who decodes what: hands the window's tickets to decoder processes, starts, times, blames and replaces them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from capcli.errors import CapcliError, ImageError
from capcli.loading.window import Ticket, Window
from capcli.loading.worker import AHEAD, LONGEST_PATH, Worker, encode_path
from capcli.loading.worker_main import Decoded
from capcli.records import Failure, Loaded

_START_TIMEOUT = 120.0  # seconds until a worker is ready; a cold network disk is slow to import from
_STILLBORN = 3  # workers in a row that ended before they were ready
_TICK = 1.0  # seconds, at most, between two looks at the clock while anything is being decoded


@dataclass(slots=True, eq=False)
class _Post:
    """A worker and what it holds; the first of its tickets is the one it decodes, since `since`."""

    worker: Worker
    since: float
    tickets: deque[Ticket] = field(default_factory=deque)
    ready: bool = False
    served: bool = False

    @property
    def busy(self) -> bool:
        return bool(self.tickets) or not self.ready


class Dispatcher:
    """Runs in a thread of its own until the window closes; leaves no process behind."""

    def __init__(self, window: Window, decode: bytes, workers: int, timeout: float, memory: int | None) -> None:
        self._window = window
        self._decode, self._timeout, self._memory = decode, timeout, memory
        self._most = workers
        self._posts: list[_Post] = []
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ)
        window.wake = self.wake
        self._stillborn = 0
        self._now = self._looked = time.monotonic()

    def wake(self) -> None:
        """Look at the window again; from any thread, and harmless when it is over."""
        with contextlib.suppress(OSError):
            self._ringer.send(b"\0")

    def run(self) -> None:
        """Have the window's tickets decoded until it closes; whatever stops that is the window's error."""
        try:
            while not self._window.closed:
                self._hand_out()
                for post in self._wait():
                    self._collect(post)
                self._look_at_the_clock()
        except BaseException as error:  # it belongs to the thread that takes
            self._window.fail(error)
        finally:
            self._end_all()

    def _hand_out(self) -> None:
        while (post := self._least_busy()) or len(self._posts) < self._most:
            ticket = self._window.next_task()
            if ticket is None:
                return
            path = encode_path(ticket.entry.path)
            if len(path) > LONGEST_PATH:
                self._window.settle(ticket, Failure(ticket.entry.name, "missing", "no file has so long a path"))
                continue
            post = post or self._start_worker()
            if post is None:
                self._window.put_back(ticket)
                continue
            self._give(post, ticket, path)

    def _give(self, post: _Post, ticket: Ticket, path: bytes) -> None:
        if post.ready and not post.tickets:
            post.since = self._now
        post.tickets.append(ticket)
        post.worker.send(path)

    def _least_busy(self) -> _Post | None:
        """Who takes the next: a worker is started only when all that run are full, as starting costs many images."""
        post = min(self._posts, key=lambda post: len(post.tickets), default=None)
        return post if post and len(post.tickets) < AHEAD else None

    def _start_worker(self) -> _Post | None:
        """A new one; None where the machine will not have more than there are."""
        try:
            post = _Post(Worker(self._decode, self._memory), self._now)
        except OSError as error:
            if self._posts:
                self._most = len(self._posts)
                return None
            raise CapcliError(f"decoder processes cannot start: {error}; --workers 0 does without") from error
        self._posts.append(post)
        self._selector.register(post.worker, selectors.EVENT_READ, post)
        return post

    def _wait(self) -> list[_Post]:
        """The workers with something to say, once there are any, or the window has news, or a deadline may be near."""
        events = self._selector.select(self._patience())
        # Time in which this process was stopped (Ctrl-Z, a frozen container) is nobody's slowness.
        looked = time.monotonic()
        self._now += min(looked - self._looked, 2 * _TICK)
        self._looked = looked
        posts = [key.data for key, _ in events if key.data is not None]
        if len(posts) < len(events):
            with contextlib.suppress(BlockingIOError):
                self._bell.recv(4096)
        return posts

    def _patience(self) -> float | None:
        deadlines = [self._deadline(post) - self._now for post in self._posts if post.busy]
        return max(0.0, min(_TICK, *deadlines)) if deadlines else None

    def _deadline(self, post: _Post) -> float:
        return post.since + (self._timeout if post.ready else _START_TIMEOUT)

    def _collect(self, post: _Post) -> None:
        try:
            answer = post.worker.receive()
        except EOFError:
            self._lost(post, self._dismiss(post))
            return
        post.since = self._now
        if answer is None:
            post.ready = True
            self._stillborn = 0
        elif not post.tickets:
            self._discard(post)  # it answers what it was not asked
        elif isinstance(answer, ImageError) and answer.kind == "out-of-memory":
            self._discard(post)  # its heap stays swollen
            self._blame(post, answer)
        else:
            self._settle(post.tickets.popleft(), answer)
            post.served = True

    def _lost(self, post: _Post, ending: str) -> None:
        """A worker has died by itself: of its image, or before it had any."""
        if post.ready and post.tickets:
            self._blame(post, ImageError("crash", f"decoding crashed: the process {ending}"))
            return
        self._put_back(post)
        if not post.ready:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                raise CapcliError(f"decoder processes cannot start: the last {ending}; --workers 0 does without")

    def _look_at_the_clock(self) -> None:
        for post in [post for post in self._posts if post.busy and self._now >= self._deadline(post)]:
            ending = self._discard(post)
            if post.ready:
                late = ImageError("timeout", f"decoding took longer than {self._timeout:g} seconds")
                self._settle(post.tickets.popleft(), late)
                self._put_back(post)
            else:
                self._lost(post, ending)

    def _blame(self, post: _Post, error: ImageError) -> None:
        """The image of a worker that is gone failed, unless others before it did that: then a fresh worker decides."""
        ticket = post.tickets.popleft()
        self._put_back(post)
        fresh = self._start_worker() if post.served else None
        if fresh:
            self._give(fresh, ticket, encode_path(ticket.entry.path))
        else:
            self._settle(ticket, error)

    def _put_back(self, post: _Post) -> None:
        while post.tickets:
            self._window.put_back(post.tickets.pop())

    def _settle(self, ticket: Ticket, answer: Decoded | ImageError) -> None:
        self._window.settle(ticket, to_result(ticket, answer))

    def _discard(self, post: _Post) -> str:
        post.worker.kill()
        return self._dismiss(post)

    def _dismiss(self, post: _Post) -> str:
        self._posts.remove(post)
        self._selector.unregister(post.worker)
        return post.worker.end()

    def _end_all(self) -> None:
        for post in self._posts:
            post.worker.kill()
        for post in list(self._posts):
            self._dismiss(post)
        self._selector.close()
        self._bell.close()
        self._ringer.close()


def to_result(ticket: Ticket, answer: Decoded | ImageError) -> Loaded | Failure:
    """A worker's answer, or `attempt`'s, in the words of the run."""
    name = ticket.entry.name
    if isinstance(answer, ImageError):
        return Failure(name, answer.kind, str(answer))
    return Loaded(name, *answer, encoder_ids=ticket.entry.encoder_ids)
