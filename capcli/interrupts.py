"""SIGINT (Ctrl-C) and SIGTERM: the first one ends the run after the work in progress, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

from capcli import console


def announced(work: str = "the work in progress") -> str:
    """The line that is printed at the first signal: `work` is what is finished before the program ends."""
    return f"capcli: interrupted; finishing {work} (interrupt again to exit at once)"


class Interrupts:
    """A context in which the first SIGINT or SIGTERM only sets `signal`; a second one raises SystemExit.

    Unless `quiet`, the first one prints the line that `message` returns. The second one calls `at_once` before it raises. Both
    are called in the signal handler: they must neither wait for a lock nor use a stream. A launcher may send the process a
    signal that it has already received, so a second one is ignored for `grace` seconds. Outside the main thread, where
    Python runs no signal handlers, the context has no effect.
    """

    def __init__(
        self,
        *,
        quiet: bool,
        grace: float = 0.0,
        message: Callable[[], str] = announced,
        at_once: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.signal: int | None = None
        self._message, self._at_once = message, at_once
        self._quiet, self._grace, self._received = quiet, grace, 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether the run should finish."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects of a program ended by the signal, 130 or 143; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked child: the parent owns the run and ends its children
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal is not None:
            if time.monotonic() - self._received < self._grace:
                return
            self._at_once(128 + number)
            raise SystemExit(128 + number)
        self.signal, self._received = number, time.monotonic()
        if not self._quiet:
            console.notify(self._message())


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """A context in which SIGTERM raises SystemExit, so that `finally` blocks and other contexts clean up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers in the main thread only
        yield
        return
    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
