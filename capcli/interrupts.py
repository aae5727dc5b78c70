"""Ctrl-C and termination: the first asks the run to finish what is under way, the second ends it at once."""

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


class Interrupts:
    """While entered, the first SIGINT or SIGTERM only sets `signal`, which is told; a second ends the program.

    A launcher may pass on what the process has heard itself: within `grace` seconds of the first there is no second.
    Outside the main thread, where Python hears no signals, it does nothing.
    """

    def __init__(self, *, quiet: bool, grace: float = 0.0) -> None:
        self.signal: int | None = None
        self._quiet, self._grace, self._heard = quiet, grace, 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended: 130 or 143; 0 where none came."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> Self:
        heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        for number in heard:
            self._before[number] = signal.signal(number, self._heed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heed(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a fork of ours: the run is its parent's, which ends it
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.signal is not None:
            if time.monotonic() - self._heard < self._grace:
                return
            raise SystemExit(128 + number)
        self.signal, self._heard = number, time.monotonic()
        if not self._quiet:
            # Past Python's buffers, in whose use the signal may have come; on a terminal, behind its ^C.
            line = "capcli: finishing what is under way; again, to leave at once\n"
            with contextlib.suppress(OSError):
                os.write(2, f"{chr(10) if sys.stderr.isatty() else ''}{line}".encode())


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """In it SIGTERM ends the program as an exception does, so that what was begun is cleaned up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python lets no handler be set
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
