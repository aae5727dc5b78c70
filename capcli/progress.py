"""Counts of a run, and their display: a progress bar on a terminal, otherwise a line from time to time, and a summary."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

from capcli.records import Caption, Failure
from capcli.text import printable, printable_lines

PLAIN_EVERY = 30.0  # seconds between lines if standard error is not a terminal
BAR_EVERY = 0.1  # seconds between updates of the bar


class Counted(Protocol):
    """Counts that can be displayed: images done, those of them that failed, images skipped, and images per second."""

    @property
    def done(self) -> int: ...

    @property
    def failed(self) -> int: ...

    @property
    def skipped(self) -> int: ...

    @property
    def rate(self) -> float: ...


@dataclass(slots=True)
class Report:
    """Counts of a caption run. `skipped` images were done by earlier runs, `on_record` images failed in earlier runs."""

    captioned: int = 0
    failed: int = 0
    skipped: int = 0
    on_record: int = 0
    began: float = field(default_factory=time.monotonic)

    def add(self, result: Caption | Failure) -> None:
        if isinstance(result, Failure):
            self.failed += 1
        else:
            self.captioned += 1

    @property
    def done(self) -> int:
        """Images of this run, failures included."""
        return self.captioned + self.failed

    @property
    def seen(self) -> int:
        """Images of this run and of earlier runs."""
        return self.done + self.skipped

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        """Images per second, failures included."""
        return self.done / max(self.seconds, 1e-9)

    @property
    def exit_code(self) -> int:
        """3 if any image failed, in this run or an earlier one, otherwise 0."""
        return 3 if self.failed or self.on_record else 0

    def line(self) -> str:
        """The summary of the run."""
        them = "it" if self.on_record == 1 else "them"
        old = f" ({self.on_record} failed before: --retry-failed tries {them} again)" if self.on_record else ""
        done = f"{self.captioned} captioned, {self.skipped} skipped, {self.failed} failed{old}"
        return f"{done}, {self.rate:.1f} images/s" if self.done else done


class Progress:
    """A context that displays a report on standard error, if `shown`: a bar on a terminal, otherwise a line every 30 s.

    `total` returns the number of images of the run, including skipped ones. It may be slow: it is called in a thread. None
    means that the number cannot be known.
    """

    def __init__(
        self, report: Counted, *, shown: bool, total: Callable[[], int] | None, task: str = "captioning"
    ) -> None:
        self._report, self._shown, self._label = report, shown, task
        self._total: int | None = None
        self._bar: Any = None
        self._next = time.monotonic() + (BAR_EVERY if sys.stderr.isatty() else PLAIN_EVERY)
        if shown and total is not None:
            threading.Thread(target=self._count, args=(total,), name="capcli-count", daemon=True).start()

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            self._bar = make_bar()
            self._task = self._bar.add_task(self._label, total=None, failed=0, rate=0.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._update_bar()
            self._bar.stop()

    def update(self) -> None:
        """Displays the report if enough time has passed since the last display. Cheap enough to be called per image."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (PLAIN_EVERY if self._bar is None else BAR_EVERY)
        if self._bar is not None:
            self._update_bar()
        else:
            say(self._line())

    def _count(self, total: Callable[[], int]) -> None:
        self._total = total()

    def _images(self) -> int | None:
        """The number of images that this run has to do, if it is known."""
        return None if self._total is None else max(self._report.done, self._total - self._report.skipped)

    def _update_bar(self) -> None:
        report = self._report
        self._bar.update(
            self._task, completed=report.done, total=self._images(), failed=report.failed, rate=report.rate
        )

    def _line(self) -> str:
        report, images = self._report, self._images()
        of = "" if images is None else f" of {images}"
        left = "" if images is None or not report.done else f", {duration((images - report.done) / report.rate)} left"
        return f"{report.done}{of} done, {report.failed} failed, {report.rate:.1f} images/s{left}"


def say(line: str) -> None:
    """Prints a line on standard error, without control characters. If that is closed, the run continues without messages."""
    try:
        print(printable_lines(line), file=sys.stderr, flush=True)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)  # otherwise the interpreter fails at exit, when it flushes the buffer
        os.close(null)


def warn(line: str) -> None:
    """Prints a line on standard error that starts with the name of the program."""
    say(f"capcli: {printable(line)}")


def make_bar() -> Any:
    """A rich progress bar: images done, total, failures, images per second, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TextColumn("{task.fields[rate]:.1f} images/s"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
        transient=True,
    )


def duration(seconds: float) -> str:
    """A rounded duration: `40 s`, `12 min`, `3 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
