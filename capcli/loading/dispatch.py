"""The dispatcher: starts decoder processes, gives them the window's tasks, checks their time and replaces them."""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from capcli.errors import CapcliError, ImageError
from capcli.imports import lacks_files
from capcli.loading.window import Task, Window
from capcli.loading.worker import AHEAD, LONGEST_PATH, Worker, encode_path
from capcli.loading.worker_main import Decoded
from capcli.records import Failure, Loaded

_START_TIMEOUT = 120.0  # seconds until a worker is ready; importing from a cold network disk is slow
_MAX_FAILED_STARTS = 3  # workers in a row that ended before they were ready
_TICK = 1.0  # seconds, at most, between two checks of the deadlines while anything is being decoded


@dataclass(slots=True, eq=False)
class _WorkerState:
    """A worker and its tasks: it decodes the first, since the time `since`, and the others wait."""

    worker: Worker
    since: float
    tasks: deque[Task] = field(default_factory=deque)
    ready: bool = False
    decoded_any: bool = False

    @property
    def busy(self) -> bool:
        return bool(self.tasks) or not self.ready


class Dispatcher:
    """Runs in a thread of its own until the window closes, and ends all its processes then."""

    def __init__(self, window: Window, decode: bytes, workers: int, timeout: float, memory: int | None) -> None:
        self._window = window
        self._decode, self._timeout, self._memory = decode, timeout, memory
        self._max_workers = workers
        self._workers: list[_WorkerState] = []
        self._selector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)
        window.wake = self.wake
        self._failed_starts = 0
        self._now = self._last_check = time.monotonic()

    def wake(self) -> None:
        """Make the dispatcher check the window again; may be called from any thread, also after its end."""
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"\0")

    def run(self) -> None:
        """Have the window's tasks decoded until it closes; an error that prevents that becomes the window's error."""
        try:
            while not self._window.closed:
                self._hand_out()
                for state in self._wait():
                    self._collect(state)
                self._check_deadlines()
        except BaseException as error:  # the thread that takes raises it
            self._window.fail(error)
        finally:
            self._end_all()

    def _hand_out(self) -> None:
        while (state := self._least_busy()) or len(self._workers) < self._max_workers:
            task = self._window.next_task()
            if task is None:
                return
            path = encode_path(task.entry.path, task.entry.prompt)
            if len(path) > LONGEST_PATH:
                self._window.finish(task, Failure(task.entry.name, "missing", "the path, or its prompt, is too long"))
                continue
            state = state or self._start_worker()
            if state is None:
                self._window.put_back(task)
                continue
            self._give(state, task, path)

    def _give(self, state: _WorkerState, task: Task, path: bytes) -> None:
        if state.ready and not state.tasks:
            state.since = self._now
        state.tasks.append(task)
        state.worker.send(path)

    def _least_busy(self) -> _WorkerState | None:
        """A worker with room for a task. A new one starts only when there is none: a start costs as much as many images."""
        state = min(self._workers, key=lambda state: len(state.tasks), default=None)
        return state if state and len(state.tasks) < AHEAD else None

    def _start_worker(self) -> _WorkerState | None:
        """A new worker; None where no more can be started but some are running."""
        try:
            state = _WorkerState(Worker(self._decode, self._memory), self._now)
        except OSError as error:
            if self._workers:
                self._max_workers = len(self._workers)
                return None
            raise CapcliError(
                f"decoder processes cannot start: {error}; use --workers 0 to run without them"
                + ("" if not lacks_files(error) else ", or raise the limit: ulimit -n 1024")
            ) from error
        self._workers.append(state)
        self._selector.register(state.worker, selectors.EVENT_READ, state)
        return state

    def _wait(self) -> list[_WorkerState]:
        """The workers with answers. Returns as soon as there are any, the window changed, or a deadline may have passed."""
        events = self._selector.select(self._seconds_to_deadline())
        # Time in which this process itself was stopped (Ctrl-Z, a frozen container) does not count as decoding time.
        now = time.monotonic()
        self._now += min(now - self._last_check, 2 * _TICK)
        self._last_check = now
        states = [key.data for key, _ in events if key.data is not None]
        if len(states) < len(events):
            with contextlib.suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        return states

    def _seconds_to_deadline(self) -> float | None:
        deadlines = [self._deadline(state) - self._now for state in self._workers if state.busy]
        return max(0.0, min(_TICK, *deadlines)) if deadlines else None

    def _deadline(self, state: _WorkerState) -> float:
        return state.since + (self._timeout if state.ready else _START_TIMEOUT)

    def _collect(self, state: _WorkerState) -> None:
        try:
            answer = state.worker.receive()
        except EOFError:
            self._ended(state, self._remove(state))
            return
        state.since = self._now
        if answer is None:
            state.ready = True
            self._failed_starts = 0
        elif not state.tasks:
            self._kill(state)  # an answer without a task
        elif isinstance(answer, ImageError) and answer.kind == "out-of-memory":
            self._kill(state)  # its heap does not shrink again
            self._fail_or_retry(state, answer)
        else:
            self._finish(state.tasks.popleft(), answer)
            state.decoded_any = True

    def _ended(self, state: _WorkerState, ending: str) -> None:
        """A worker ended by itself, or was not ready in time: the cause is its current image, if it was ready."""
        if state.ready and state.tasks:
            self._fail_or_retry(state, ImageError("crash", f"decoding crashed: the process {ending}"))
            return
        self._put_back(state)
        if not state.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise CapcliError(
                    f"decoder processes cannot start: the last {ending}; use --workers 0 to run without them"
                )

    def _check_deadlines(self) -> None:
        for state in [state for state in self._workers if state.busy and self._now >= self._deadline(state)]:
            ending = self._kill(state)
            if state.ready:
                late = ImageError("timeout", f"decoding took longer than {self._timeout:g} seconds")
                self._finish(state.tasks.popleft(), late)
                self._put_back(state)
            else:
                self._ended(state, ending)

    def _fail_or_retry(self, state: _WorkerState, error: ImageError) -> None:
        """The current image of a worker that has ended: it fails with `error`, or is tried again in a new process.

        An image that the process decoded earlier may be the cause, so only the first image of a process fails at once.
        """
        task = state.tasks.popleft()
        self._put_back(state)
        new = self._start_worker() if state.decoded_any else None
        if new:
            self._give(new, task, encode_path(task.entry.path, task.entry.prompt))
        else:
            self._finish(task, error)

    def _put_back(self, state: _WorkerState) -> None:
        while state.tasks:
            self._window.put_back(state.tasks.pop())

    def _finish(self, task: Task, answer: Decoded | ImageError) -> None:
        self._window.finish(task, to_result(task, answer))

    def _kill(self, state: _WorkerState) -> str:
        state.worker.kill()
        return self._remove(state)

    def _remove(self, state: _WorkerState) -> str:
        self._workers.remove(state)
        self._selector.unregister(state.worker)
        return state.worker.end()

    def _end_all(self) -> None:
        for state in self._workers:
            state.worker.kill()
        for state in list(self._workers):
            self._remove(state)
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()


def to_result(task: Task, answer: Decoded | ImageError) -> Loaded | Failure:
    """The result of a task from the answer of a worker or of `attempt`."""
    name = task.entry.name
    if isinstance(answer, ImageError):
        return Failure(name, answer.kind, str(answer))
    return Loaded(name, *answer, encoder_ids=task.entry.encoder_ids, prompt=task.entry.prompt)
