"""The live view of a training run on standard error: a rich display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from capcli.progress import BAR_EVERY, PLAIN_EVERY, duration, say
from capcli.text import counted, printable
from capcli.training.output.checkpoints import Select
from capcli.training.output.history import Point

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE = 24  # characters at most
RECENT = 1000  # reports from which the time left is computed
TASK_SCORES = ("_accuracy", "_restored", "_CIDEr")  # ends of the names of scores of single tasks


@dataclass(frozen=True, slots=True)
class Sample:
    """A validation image with the caption that the model generates now and one of its reference captions."""

    name: str
    caption: str
    reference: str


class StandardErrorConsole(Console):
    """A console on standard error that raises BrokenPipeError, while rich's own console exits the program."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the BrokenPipeError."""
        raise


class LiveView:
    """Shows a run of `total_steps` steps on standard error while it is entered.

    A resumed run gives the step of its checkpoint as `first_step`. The time left is computed from this run's steps only. On
    a terminal the display is redrawn at most ten times a second, otherwise a line is written every 30 seconds and at each
    evaluation. `quiet` shows nothing. `clock` returns seconds. No method raises when the terminal or the reader of the
    pipe is gone: the view is disabled and the training continues.

    rich draws only inside these methods, never in a thread: DataLoader workers are forked from this process, and a lock
    that a thread holds at that moment would stay locked in them.
    """

    def __init__(
        self, total_steps: int, *, first_step: int = 0, quiet: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quiet = quiet or sys.stderr is None  # None: standard error was closed before Python started
        self._clock = clock
        self._total = total_steps
        self._latest = Point(first_step, 0.0)  # the latest value of every figure
        self._best: int | None = None
        self._losses: list[float] = []
        self._evaluating: tuple[int, int] | None = None
        self._reports: deque[tuple[float, int]] = deque(maxlen=RECENT)  # seconds and step
        self._console = StandardErrorConsole()
        self._drawn = not self._quiet and self._console.is_terminal and not self._console.is_dumb_terminal
        self._next = clock() + (0.0 if self._drawn else PLAIN_EVERY)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # output to a file still goes there
        )

    def __enter__(self) -> Self:
        if self._drawn:
            with self._turned_off_on_error():
                self._live.update(self._display())
                self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn:
            with self._turned_off_on_error():
                self._live.stop()

    def write_line(self, text: str) -> None:
        """Writes a permanent line, above the display where there is one."""
        if not self._quiet:
            for line in text.splitlines() or [""]:
                self._write(printable(line))

    def step(self, point: Point) -> None:
        """Shows the figures of an optimizer step. Cheap enough to call at every step."""
        if self._quiet:
            return
        self._update(point)
        if point.loss is not None and math.isfinite(point.loss):
            self._losses.append(point.loss)
        self._reports.append((self._clock(), point.step))
        self._refresh(self._line([*self._loss(), *self._speed()]))

    def evaluating(self, done: int, total: int) -> None:
        """Shows how far an evaluation is: `done` of `total` validation images have a caption."""
        if self._quiet:
            return
        self._evaluating = (done, total)
        self._refresh(self._line([f"evaluated {done} of {counted(total, 'image')}"]))

    def evaluated(self, point: Point, samples: Sequence[Sample], best: Select | None) -> None:
        """Writes the result of an evaluation with its sample captions.

        `best` is the measure by which no earlier evaluation was better, None where one was.
        """
        if self._quiet:
            return
        self._update(point)
        self._best = self._best if best is None else point.step
        shown = [Sample(printable(s.name), printable(s.caption), printable(s.reference)) for s in samples]
        speed = [] if self._drawn else self._speed()
        self._write(self._line([*self._loss(), *self._results(point, best), *speed]), style="bold")
        if self._drawn:
            with self._turned_off_on_error():
                self._console.print(samples_table(shown, self._console.width))
        else:
            for sample in shown:
                self._write(f"  {sample.name}: {sample.caption} (reference: {sample.reference})")
            self._next = self._clock() + PLAIN_EVERY

    def _update(self, point: Point) -> None:
        self._evaluating = None
        self._latest = replace(self._latest.merged(point), step=point.step)

    def _write(self, line: str, style: str = "") -> None:
        if not self._drawn:
            say(line)
            return
        with self._turned_off_on_error():
            self._console.print(Text(line, style))

    def _refresh(self, line: str) -> None:
        """Redraws the display, or writes `line`, if an update is due."""
        now = self._clock()
        if now < self._next:
            return
        if not self._drawn:
            self._next = now + PLAIN_EVERY
            say(line)
            return
        self._next = now + BAR_EVERY
        with self._turned_off_on_error():
            self._live.update(self._display(), refresh=True)

    def _line(self, figures: Sequence[str]) -> str:
        return f"step {self._latest.step}/{self._total}: {', '.join(figures) or 'running'}"

    def _loss(self) -> list[str]:
        return [] if self._latest.loss is None else [f"loss {short(self._latest.loss)}"]

    def _results(self, point: Point, best: Select | None) -> list[str]:
        measured = {} if point.val_loss is None else {"loss": f"validation loss {short(point.val_loss)}"}
        measured |= {
            name.lower() if name == "CIDEr" else name: f"{name} {value:.3f}"
            for name, value in sorted(point.scores.items(), key=lambda score: score[0] != "CIDEr")
            if name == "CIDEr" or name.endswith(TASK_SCORES)
        }
        if best is not None:
            measured[best] = f"{measured[best]} (best so far)" if best in measured else "best so far"
        return list(measured.values()) or ["evaluated"]

    def _speed(self) -> list[str]:
        """Images per second and the time left, where they are known."""
        rate = self._latest.images_per_second
        left = self._seconds_left()
        return [
            *([] if rate is None else [f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s"]),
            *([f"{duration(math.ceil(left))} left"] if left else []),
        ]

    def _seconds_left(self) -> float | None:
        """The steps left at the recent pace, which includes evaluations; None before the second report."""
        if len(self._reports) < 2:
            return None
        (began, first), (_, last) = self._reports[0], self._reports[-1]
        return (self._clock() - began) / max(last - first, 1) * (self._total - last)

    def _display(self) -> RenderableType:
        bar = ProgressBar(total=max(self._total, 1), completed=min(self._latest.step, self._total))
        return Group(self._text_above(), Padding(bar, 0), self._text_below())  # Padding ends the bar's line

    def _text_above(self) -> Text:
        epoch = [f"epoch {self._latest.epoch:.2f}"] if self._latest.epoch else []
        evaluating = ["evaluating {}/{} images".format(*self._evaluating)] if self._evaluating else []
        return Text(
            "   ".join([f"step {self._latest.step}/{self._total}", *epoch, *evaluating, *self._speed()]), "bold"
        )

    def _text_below(self) -> Text:
        latest = self._latest
        figures = [Text(loss) for loss in self._loss()]
        if figures and "utf" in self._console.encoding:
            figures[0].append(f" {sparkline(self._losses, min(SPARKLINE, self._console.width // 3))}", "blue")
        if latest.val_loss is not None:
            figures.append(Text(f"validation loss {short(latest.val_loss)}"))
        if "CIDEr" in latest.scores:
            figures.append(Text(f"CIDEr {latest.scores['CIDEr']:.3f}"))
        if self._best is not None:
            figures.append(Text(f"best at step {self._best}", "green"))
        return Text("   ").join(figures)

    @contextlib.contextmanager
    def _turned_off_on_error(self) -> Iterator[None]:
        """A context for output to the terminal: if that is closed, the view is disabled."""
        try:
            yield
        except (OSError, ValueError):  # ValueError: standard error was closed
            self._quiet, self._drawn, self._console.quiet = True, False, True
            with contextlib.suppress(OSError, ValueError, IndexError):  # IndexError: the display never started
                self._live.stop()
            with contextlib.suppress(OSError):  # what is left in Python's buffer would fail when the program ends
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 2)
                os.close(devnull)


def samples_table(samples: Sequence[Sample], width: int) -> RenderableType:
    """Names in one column, captions and references in the other."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=max(width // 4, 1), no_wrap=True, overflow="ellipsis")
    table.add_column(overflow="fold")
    for sample in samples:
        table.add_row(Text(sample.name), Text(sample.caption))
        table.add_row(Text("reference", "dim"), Text(sample.reference, "dim"))
    return Padding(table, (0, 0, 0, 2)) if samples else Text(end="")


def sparkline(values: Sequence[float], width: int) -> str:
    """All values as at most `width` block characters, a mean each; "" for fewer than two values."""
    values = values[:: 1 + len(values) // 4096]
    count = min(width, len(values))
    if count < 2:
        return ""
    edges = [len(values) * n // count for n in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    if min(means) > 0:
        means = list(map(math.log, means))  # the steep start would flatten the rest
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / ((high - low) or 1.0)
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def short(value: float) -> str:
    """A loss in about three digits."""
    if abs(value) >= 1e4 or 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"
