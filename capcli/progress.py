"""How a run goes: its counts, a bar or now and then a line while it lasts, and one line at its end."""

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

PLAIN_EVERY = 30.0  # seconds between lines where standard error is no terminal
BAR_EVERY = 0.1


class Counted(Protocol):
    """What progress is shown of: images done, with those that failed, and those that an earlier run did."""

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
    """What a run did so far. `failed` counts this run, `on_record` the failures of earlier ones that still stand."""

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
        return self.captioned + self.failed

    @property
    def seen(self) -> int:
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
        return 3 if self.failed or self.on_record else 0

    def line(self) -> str:
        them = "it" if self.on_record == 1 else "them"
        old = f" ({self.on_record} failed before: --retry-failed tries {them} again)" if self.on_record else ""
        done = f"{self.captioned} captioned, {self.skipped} skipped, {self.failed} failed{old}"
        return f"{done}, {self.rate:.1f} images/s" if self.done else done


class Progress:
    """Shows a report on standard error until it is closed: a bar on a terminal, else a line now and then.

    `total` counts what there is to do and may take its time: it runs in a thread of its own; None where nobody can know.
    """

    def __init__(
        self, report: Counted, *, shown: bool, total: Callable[[], int] | None, task: str = "captioning"
    ) -> None:
        self._report, self._shown, self._what = report, shown, task
        self._total: int | None = None
        self._bar: Any = None
        self._next = time.monotonic() + (BAR_EVERY if sys.stderr.isatty() else PLAIN_EVERY)
        if shown and total is not None:
            threading.Thread(target=self._count, args=(total,), name="capcli-count", daemon=True).start()

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            self._bar = make_bar()
            self._task = self._bar.add_task(self._what, total=None, failed=0, rate=0.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def update(self) -> None:
        """To be called often; shows something when it is time."""
        if not self._shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (PLAIN_EVERY if self._bar is None else BAR_EVERY)
        if self._bar is not None:
            self._draw()
        else:
            say(self._words())

    def _count(self, total: Callable[[], int]) -> None:
        self._total = total()

    def _draw(self) -> None:
        report = self._report
        total = None if self._total is None else max(report.done, self._total - report.skipped)
        self._bar.update(self._task, completed=report.done, total=total, failed=report.failed, rate=report.rate)

    def _words(self) -> str:
        report, done = self._report, self._report.done
        total = None if self._total is None else max(done, self._total - report.skipped)
        of = "" if total is None else f" of {total}"
        left = "" if total is None or not done else f", {duration((total - done) / report.rate)} left"
        return f"{done}{of} done, {report.failed} failed, {report.rate:.1f} images/s{left}"


def say(line: str) -> None:
    """A line on standard error. Where nobody reads it any more the run goes on: what counts is in its files."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # the interpreter would fail at its end on what is left in the buffer
        os.close(nowhere)


def warn(line: str) -> None:
    """A line on standard error that says who speaks."""
    say(f"capcli: {line}")


def make_bar() -> Any:
    """A rich progress bar: done, total, failures, images per second, time left."""
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
    """A rough time for people: 40 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
