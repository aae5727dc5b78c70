"""The live display of a training run on a terminal, drawn by rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from capcli.progress import duration
from capcli.training.output.standing import TrainingState, figure, per_second

WIDEST = 100  # cells of the display, on however wide a terminal
SPARK = 24
ROOM = 44  # cells from which names stand beside their captions
BETWEEN = "   "


class StandardError(Console):
    """rich's console on standard error; a closed pipe is the caller's to deal with, and not the program's end."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Called while the BrokenPipeError is handled; rich's own ends the program."""
        raise


class Terminal:
    """Lines that stay, and below them the display. Every method may raise OSError or ValueError when the terminal is gone.

    All text is taken to be printable. Nothing is drawn by a thread: worker processes are forked from this one, and
    a lock that another thread holds would stay locked in them.
    """

    def __init__(self) -> None:
        self._console = StandardError()
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # what goes to a file goes on doing so
        )

    @property
    def capable(self) -> bool:
        """Whether the terminal can be drawn on."""
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def give_up(self) -> None:
        """Leave a terminal that is gone."""
        self._console.quiet = True
        with contextlib.suppress(OSError, ValueError, IndexError):  # IndexError: rich's, for what never started
            self._live.stop()

    def show(self, now: TrainingState) -> None:
        self._live.update(self._display(now), refresh=True)

    def write(self, lines: Iterable[str]) -> None:
        self._console.print(*map(Text, lines), sep="\n")

    def write_evaluation(self, line: str, samples: Sequence[tuple[str, str, str]]) -> None:
        """A line, and each image's name, caption and reference below it."""
        rows: list[tuple[Text, ...]] = [
            row
            for name, caption, reference in samples
            for row in (
                (Text(name), Text(caption)),
                (Text("reference", style="dim"), Text(reference, style="dim")),
            )
        ]
        table = Table.grid(padding=(0, 2, 0, 0))
        if self._console.width < ROOM:
            rows = [(part,) for row in rows for part in row]
        else:
            table.add_column(max_width=self._console.width // 4, no_wrap=True, overflow="ellipsis")
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(Text(line, style="bold"), *([Padding(table, (0, 0, 0, 2))] if rows else []), sep="\n")

    def _display(self, now: TrainingState) -> RenderableType:
        width = min(self._console.width, WIDEST)
        bar = ProgressBar(total=max(1, now.total), completed=min(now.step, now.total), width=width)
        lines = Table.grid()
        lines.add_column(no_wrap=True, overflow="ellipsis")
        shown: list[RenderableType] = [*packed(list(self._way(now)), width), bar]
        for line in (*shown, *packed(list(self._measures(now)), width)):
            lines.add_row(line)
        return lines

    def _way(self, now: TrainingState) -> Iterable[Text]:
        yield fact("step", f"{now.step}/{now.total}")
        if now.epoch is not None:
            yield fact("epoch", f"{now.epoch:.2f}")
        if now.evaluating is not None:
            yield fact("evaluating", "{}/{}".format(*now.evaluating), "images", style="yellow")
        elif now.rate is not None:
            yield fact("", per_second(now.rate), "images/s")
        if now.left is not None:
            yield fact("", duration(now.left), "left")

    def _measures(self, now: TrainingState) -> Iterable[Text]:
        if now.loss is not None:
            line = fact("loss", figure(now.loss))
            if "utf" in self._console.encoding:
                line.append(f" {now.losses.blocks(SPARK)}", "blue")
            yield line
        if now.val_loss is not None:
            yield fact("validation loss", figure(now.val_loss))
        if now.cider is not None:
            yield fact("CIDEr", f"{now.cider:.3f}")
        if now.best is not None:
            yield fact("best at step", str(now.best), style="green")


def fact(label: str, value: str, unit: str = "", style: str = "") -> Text:
    """A value with its name before it or its unit behind."""
    parts = [(label, style or "dim"), (value, f"bold {style}".strip()), (unit, style or "dim")]
    return Text(" ").join(Text(*part) for part in parts if part[0])


def packed(items: Sequence[Text], width: int) -> list[Text]:
    """The items on as few lines as they fit on, in their order."""
    lines: list[Text] = []
    for item in items:
        if lines and cell_len(lines[-1].plain) + len(BETWEEN) + cell_len(item.plain) <= width:
            lines[-1].append(BETWEEN).append_text(item)
        else:
            lines.append(item.copy())
    return lines
