"""SIGINT (Ctrl-C) and SIGTERM: the first one ends the run after the work in progress, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any, Self

MESSAGE = "capcli: interrupted; finishing the work in progress (interrupt again to exit at once)\n"


class Interrupts:
    """A context in which the first SIGINT or SIGTERM only sets `signal`; a second one raises SystemExit.

    Unless `quiet`, the first one prints a line. A launcher may send the process a signal that it has already received, so a
    second one is ignored for `grace` seconds. Outside the main thread, where Python runs no signal handlers, the context
    has no effect.
    """

    def __init__(self, *, quiet: bool, grace: float = 0.0) -> None:
        self.signal: int | None = None
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
            raise SystemExit(128 + number)
        self.signal, self._received = number, time.monotonic()
        if not self._quiet:
            # Not through sys.stderr: the signal may have interrupted a write to its buffer. A terminal has printed ^C.
            with contextlib.suppress(OSError):
                os.write(2, f"{chr(10) if sys.stderr.isatty() else ''}{MESSAGE}".encode())


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
