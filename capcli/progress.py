"""Counts of a run, and their display: a status line on a terminal, otherwise a line from time to time, and a summary."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from capcli import console
from capcli.records import Caption, Failure
from capcli.text import printable, printable_lines

if TYPE_CHECKING:  # slow to import, and not needed without a terminal
    from rich.console import RenderableType

PLAIN_EVERY = 30.0  # seconds between lines if standard error is not a terminal
BAR_EVERY = 0.1  # seconds between two states of the moving sign
BAR_WIDTH = 16  # columns
STAGE_WIDTH = 10  # columns: a bar after "encoding" does not move when "captioning" follows
SPINNER = "|/-\\"


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


class Work(Protocol):
    """What a run does at the moment: a `stage` in one word or two, and how many images are `under_way` in it."""

    @property
    def stage(self) -> str: ...

    @property
    def under_way(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OneStage:
    """The work of a run that has a single stage, in which few images are under way."""

    stage: str
    under_way: int = 0


class Progress:
    """A context that displays a report on standard error, if `shown`: a status line on a terminal, otherwise a line every 30 s.

    `total` returns the number of images of the run, including skipped ones. It may be slow: it is called in a thread. None
    means that the number cannot be known.
    """

    def __init__(self, report: Counted, *, shown: bool, total: Callable[[], int] | None, work: Work) -> None:
        self._report, self._shown, self._work = report, shown, work
        self._drawn = shown and console.can_draw()
        self._began = time.monotonic()
        self._next = self._began + PLAIN_EVERY
        self._contexts = contextlib.ExitStack()
        self.total: int | None = None
        if shown and total is not None:
            threading.Thread(target=self._count, args=(total,), name="capcli-count", daemon=True).start()

    def __enter__(self) -> Self:
        if self._drawn:
            self._contexts.enter_context(console.status(self._render))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._contexts.close()

    def update(self) -> None:
        """Without a terminal, writes a line if enough time has passed since the last. Cheap enough to be called per image."""
        if self._shown and not self._drawn and time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY
            say(self._line())

    def seconds_left(self) -> float | None:
        """The time left in seconds; None where it cannot be estimated. An image under way counts as half done."""
        report, images = self._report, self._images()
        if images is None or not report.done:
            return None
        work = report.done + self._work.under_way / 2
        return max(0.0, images - work) * (time.monotonic() - self._began) / work

    def _count(self, total: Callable[[], int]) -> None:
        self.total = total()

    def _images(self) -> int | None:
        """The number of images that this run has to do, if it is known."""
        return None if self.total is None else max(self._report.done, self.total - self._report.skipped)

    def _render(self) -> RenderableType:
        report, work, images = self._report, self._work, self._images()
        done = f"{report.done}/{'?' if images is None else images}"
        under_way = [f"{work.under_way} under way"] if work.under_way else []
        rate = [f"{report.rate:.1f} images/s"] if report.done else []
        seconds = self.seconds_left()
        left = [] if seconds is None else [f"{duration(seconds)} left"]
        text = "  ".join([done, *under_way, f"{report.failed} failed", *rate, *left])
        return status_row(work.stage, text, None if images is None else report.done / max(1, images))

    def _line(self) -> str:
        report, images, seconds = self._report, self._images(), self.seconds_left()
        of = "" if images is None else f" of {images}"
        left = "" if seconds is None else f", {duration(seconds)} left"
        return f"{report.done}{of} done, {report.failed} failed, {report.rate:.1f} images/s{left}"


def is_shown(*, quiet: bool, reads_stdin: bool) -> bool:
    """Whether a run shows what it does: not if it is quiet, nor where the user types names on the same terminal."""
    return not quiet and not (reads_stdin and sys.stdin.isatty())


def stage(name: str, *, shown: bool) -> contextlib.AbstractContextManager[None]:
    """A context in which a terminal shows the stage `name` and for how long it has been going on."""
    began = time.monotonic()
    return console.status(lambda: status_row(name, duration(time.monotonic() - began))) if shown else nullcontext()


def status_row(stage: str, text: str, part: float | None = None) -> RenderableType:
    """One row: a sign that moves, the stage, a bar with the `part` that is done if it is given, the text."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table
    from rich.text import Text

    sign = SPINNER[int(time.monotonic() / BAR_EVERY) % len(SPINNER)]
    cells: list[RenderableType] = [f"{sign} {stage:{STAGE_WIDTH}}"]
    if part is not None:
        cells.append(ProgressBar(total=1.0, completed=min(1.0, part), width=BAR_WIDTH))
    row = Table.grid(*(Column(no_wrap=True) for _ in range(len(cells) + 1)), padding=(0, 2, 0, 0))
    row.add_row(*cells, Text(text, no_wrap=True))
    return row


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


def duration(seconds: float) -> str:
    """A rounded duration: `40 s`, `12 min`, `3 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
