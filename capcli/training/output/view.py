"""How a training run shows itself while it lasts: a live display on a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from capcli.progress import BAR_EVERY, PLAIN_EVERY, say
from capcli.text import counted, printable
from capcli.training.output.history import Point
from capcli.training.output.pace import TimeLeft
from capcli.training.output.standing import TrainingState, evaluation_line, progress_line, speed

if TYPE_CHECKING:
    from capcli.training.output.terminal import Terminal


@dataclass(frozen=True, slots=True)
class Sample:
    """A validation image's caption as the model now gives it, and one that a person gave."""

    name: str
    caption: str
    reference: str


class View:
    """Shows a run of `total_steps`, gone on with after `first_step`, on standard error while it is entered.

    `quiet` shows nothing at all. Nothing here ends a training run: where nobody reads any more, nothing is written.
    `clock` gives seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        quiet: bool,
        first_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now = TrainingState(total_steps, first_step)
        self._pace = TimeLeft(total_steps, first_step)
        self._quiet, self._clock = quiet or sys.stderr is None, clock  # None: closed before the program began
        self._terminal: Terminal | None = None
        self._next = clock() + PLAIN_EVERY

    def __enter__(self) -> Self:
        if not self._quiet and sys.stderr.isatty():
            from capcli.training.output.terminal import Terminal

            terminal = Terminal()
            if terminal.capable:
                self._terminal = terminal
                self._try(terminal.start)
                self._draw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal is not None:
            self._try(self._terminal.stop)
            self._terminal = None

    def say(self, line: str) -> None:
        """A line that stays, above the live display."""
        if self._quiet:
            return
        lines = [printable(part) for part in line.splitlines()] or [""]
        if self._terminal is not None:
            terminal = self._terminal
            self._try(lambda: terminal.write(lines))
        else:
            for part in lines:
                say(part)

    def step(self, point: Point) -> None:
        """An optimizer step is done. Cheap: the display follows at most ten times a second."""
        if self._quiet:
            return
        self._now.evaluating = None
        self._now.heed(point)
        self._pace.step(point.step, self._clock())
        self._refresh(lambda: say(progress_line(self._now)))

    def evaluating(self, done: int, total: int) -> None:
        """An evaluation is under way: `done` of `total` validation images are captioned, or their loss measured."""
        if self._quiet:
            return
        self._now.evaluating = (done, total)
        self._pace.pause(self._clock())
        self._refresh(
            lambda: say(f"step {self._now.step}/{self._now.total}: evaluated {done} of {counted(total, 'image')}")
        )

    def evaluated(self, point: Point, samples: Sequence[Sample], best: bool) -> None:
        """An evaluation is done: what it measured and said stays on the screen. `best`: none before was better."""
        if self._quiet:
            return
        self._now.evaluating = None
        self._now.heed(point)
        self._now.best = point.step if best else self._now.best
        self._pace.resume(self._clock())
        self._now.left = self._pace.left(self._clock())
        shown = [Sample(printable(s.name), printable(s.caption), printable(s.reference)) for s in samples]
        line = evaluation_line(self._now, point, best)
        if self._terminal is not None:
            terminal = self._terminal
            self._try(lambda: terminal.write_evaluation(line, [(s.name, s.caption, s.reference) for s in shown]))
            self._draw()
            return
        say(", ".join([line, *speed(self._now)]))
        for sample in shown:
            say(f"  {sample.name}: {sample.caption} (reference: {sample.reference})")
        self._next = self._clock() + PLAIN_EVERY

    def _refresh(self, plain: Callable[[], None]) -> None:
        now = self._clock()
        if self._terminal is None and now >= self._next:
            self._now.left = self._pace.left(now)
            plain()
            self._next = now + PLAIN_EVERY
        elif self._terminal is not None and now >= self._next:
            self._draw()

    def _draw(self) -> None:
        now = self._clock()
        self._next = now + BAR_EVERY
        self._now.left = self._pace.left(now)
        if self._terminal is not None:
            terminal = self._terminal
            self._try(lambda: terminal.show(self._now))

    def _try(self, act: Callable[[], None]) -> None:
        """Do something on the terminal; where that is gone, show nothing from now on."""
        try:
            act()
        except (OSError, ValueError):  # ValueError: standard error was closed
            if self._terminal is not None:
                self._terminal.give_up()
            self._terminal, self._quiet = None, True
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)  # the interpreter would fail at its end on what is left in the buffer
                os.close(nowhere)
