"""The status line: one line at the bottom of a terminal that says what the program does, and moves while it does it.

Text that is written to the terminal by other parts of the program appears above it: they write inside `hidden()`, or to
standard error, which erases the line first. rich's own live display is not used: it hides the cursor, which a killed program
does not show again, and it cannot be erased for one row at little cost.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:  # slow to import, and not needed without a terminal
    from rich.console import RenderableType

EVERY = 0.1  # seconds between two drawings
SILENCE = 0.4  # seconds after a row, and after a line without an end, in which the line is not drawn
ERASE = "\r\x1b[2K"


def can_draw() -> bool:
    """Whether standard error is a terminal on which a line can be erased."""
    return sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


@contextlib.contextmanager
def status(render: Callable[[], RenderableType]) -> Iterator[None]:
    """A context in which a terminal shows the line that `render` returns, called from another thread ten times a second.

    A status shown inside another takes its place until it ends. Without a terminal that can draw it, nothing is shown.
    """
    global _line
    if _line is not None:
        with _line.showing(render):
            yield
    elif can_draw():
        with StatusLine(sys.stderr) as _line, _line.showing(render):
            try:
                yield
            finally:
                _line = None
    else:
        yield


@contextlib.contextmanager
def hidden(silence: float = 0.0) -> Iterator[None]:
    """A context in which the status line, if there is one, is erased; it is drawn again after `silence` seconds."""
    if _line is None:
        yield
        return
    with _line.hidden(silence):
        yield


def notify(text: str) -> None:
    """Writes a line to standard error soon. It may be called in a signal handler, which must not use `sys.stderr`."""
    if _line is not None:
        _line.notices.append(text)
    else:
        write_now(f"{chr(10) if sys.stderr.isatty() else ''}{text}\n")  # a terminal has printed ^C


def write_last(text: str) -> None:
    """Writes a line in place of the status line, at once, before the process exits without any other clean-up."""
    write_now(f"{ERASE if _line is not None else ''}{text}\n")


def write_now(text: str) -> None:
    """Writes text to the descriptor of standard error."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


class StatusLine:
    """Draws the line in a thread while it is entered. A terminal that is gone ends the drawing, not the program."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self.notices: deque[str] = deque()
        self._stream = stream
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        self._renders: list[Callable[[], RenderableType]] = []
        self._lock = threading.RLock()
        self._drawn = False
        self._silent_until = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._draw_until_ended, name="capcli-status", daemon=True)

    def __enter__(self) -> Self:
        sys.stderr = _Above(self, self._stream)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(sys.stderr, _Above):
            sys.stderr = self._stream
        with self.hidden():
            pass

    @contextlib.contextmanager
    def showing(self, render: Callable[[], RenderableType]) -> Iterator[None]:
        self._renders.append(render)
        self._draw()  # at once: an import may keep other threads from running for a while
        try:
            yield
        finally:
            self._renders.pop()

    @contextlib.contextmanager
    def hidden(self, silence: float = 0.0) -> Iterator[None]:
        with self._lock:
            if self._drawn:
                self._write(ERASE)
            self._drawn = False
            self._write_notices()
            yield
            self._silent_until = time.monotonic() + silence

    def _draw_until_ended(self) -> None:
        while not self._ended.wait(EVERY):
            self._draw()

    def _draw(self) -> None:
        with self._lock:
            if self.notices:
                with self.hidden():
                    pass
            if self._renders and time.monotonic() >= self._silent_until:
                line = self._rendered(self._renders[-1]())
                self._drawn = True
                self._write(ERASE + line)

    def _rendered(self, content: RenderableType) -> str:
        """One row, a column narrower than the terminal is now: a full row would put the cursor into the next."""
        options = self._console.options.update(
            width=max(1, self._console.width - 1), height=1, no_wrap=True, overflow="ellipsis"
        )
        lines = self._console.render_lines(content, options, pad=False)
        with self._console.capture() as capture:
            for segment in lines[0] if lines else ():
                self._console.print(segment.text, style=segment.style, end="", soft_wrap=True)
        return capture.get()

    def _write_notices(self) -> None:
        while self.notices:
            self._write(f"{self.notices.popleft()}\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):
            self._ended.set()


class _Above:
    """Standard error while there is a status line: what is written appears above it."""

    def __init__(self, line: StatusLine, stream: TextIO) -> None:
        self._line, self._stream = line, stream

    def write(self, text: str) -> int:
        with self._line.hidden(0.0 if text.endswith("\n") else SILENCE):
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_line: StatusLine | None = None  # a process has one terminal
