"""Splits the lines of a text table into records of cells.

The csv module is passed over: it removes quotes that belong to a caption, and joins rows where a quote is never closed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from capcli.annotations.text_files import line_fault
from capcli.errors import CapcliError
from capcli.text import printable

_LONGEST = 50  # lines of one quoted cell; more mean that the quote was never closed
_QUOTED = re.compile(r'"([^"]*+(?:""[^"]*+)*+)"')
_PLAIN = ("\t", "|")  # separators of tables that are written without quoting: a caption may begin with a quote


class Cells(NamedTuple):
    """The cells of a text, those of them that are not quoted, and whether the text ends within a quoted cell."""

    all: list[str]
    unquoted: list[str]
    open: bool


@dataclass(frozen=True)
class Dialect:
    """How a table's lines are split: at `separator`, except in cells that are quoted as a whole.

    Every other quote is a letter. A quoted cell may contain line breaks. `spaced`: a blank after each separator is not
    part of the cell. With `plain` a quote that is never closed is a letter too, and otherwise an error of its row.
    """

    separator: str
    spaced: bool
    plain: bool
    cell_end: re.Pattern[str] = field(repr=False)

    @classmethod
    def of(cls, first: str, separator: str) -> Dialect:
        """The dialect of the table whose first line is `first`: a program that quotes the header quotes all it must."""
        spaced = f"{separator} " in first
        all_quoted = all(_QUOTED.fullmatch(cell.strip()) for cell in first.split(separator))
        return cls(
            separator,
            spaced,
            separator in _PLAIN and not all_quoted,
            re.compile(rf" *(?:{re.escape(separator)}|(\Z))"),
        )

    def split(self, text: str) -> Cells:
        """The cells of one line, or of several that are one record, without the line end."""
        cells: list[str] = []
        unquoted: list[str] = []
        is_open, start, end = False, 0, len(text)
        while start <= end:
            while self.spaced and text.startswith(" ", start):
                start += 1
            quoted = _QUOTED.match(text, start) if text.startswith('"', start) else None
            after = quoted and self.cell_end.match(text, quoted.end())
            if quoted and after:
                cells.append(quoted[1].replace('""', '"'))
                start = end + 1 if after[1] is not None else after.end()
                continue
            is_open = is_open or (quoted is None and text.startswith('"', start))
            stop = text.find(self.separator, start)
            stop = end if stop < 0 else stop
            cells.append(text[start:stop])
            unquoted.append(cells[-1])
            start = stop + 1
        return Cells(cells, unquoted, is_open)


@dataclass
class TableReader:
    """Reads the records of the table at `path`. `is_row` tells whether the cells of a line look like a row of the table."""

    path: str
    dialect: Dialect
    is_row: Callable[[list[str]], bool]

    def records(self, stream: Iterable[str]) -> Iterator[tuple[int, list[str] | CapcliError]]:
        """The cells of each record that is not blank, or why it cannot be read, with the number of its first line."""
        lines = _Lines(iter(stream))
        simple = not self.dialect.spaced
        for line in lines:
            number = lines.number
            if simple and '"' not in line and line.isascii() and "\0" not in line:
                cells = line.rstrip("\r\n").split(self.dialect.separator)
            elif (fault := line_fault(line, self.path, number)) is not None:
                yield number, fault
                continue
            else:
                split = self._joined(line, lines)
                if split.open and not self.dialect.plain:
                    fault = CapcliError(f"{printable(self.path)}: line {number} opens a quote that is never closed")
                    yield number, fault
                    continue
                cells = split.all
            if any(cell.strip() for cell in cells):
                yield number, cells

    def _joined(self, line: str, lines: _Lines) -> Cells:
        """The cells of the record that begins with `line`; the lines that its quoted cells reach into are taken."""
        alone = self.dialect.split(line.rstrip("\r\n"))
        if not alone.open:
            return alone
        text, complete = line, self.is_row(alone.all)
        for count, following in enumerate(lines.ahead(_LONGEST), 1):
            if complete and self.is_row(self.dialect.split(following.rstrip("\r\n")).all):
                break  # two rows, of which the first has a quote that is never closed
            if line_fault(following, self.path, 0) is not None:
                break
            text += following
            if '"' in following:
                split = self.dialect.split(text.rstrip("\r\n"))
                if not split.open:
                    if any(line[-1:] in cell for cell in split.unquoted):
                        break
                    lines.skip(count)
                    return split
        return alone


class _Lines:
    """Lines that can be looked at before they are taken; `number` is that of the line taken last."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._ahead: deque[str] = deque()
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else next(self._source)
        self.number += 1
        return line

    def ahead(self, count: int) -> Iterator[str]:
        """The next lines, `count` at most, which remain to be taken."""
        for position in range(count):
            if position == len(self._ahead):
                line = next(self._source, None)
                if line is None:
                    return
                self._ahead.append(line)
            yield self._ahead[position]

    def skip(self, count: int) -> None:
        for _ in range(count):
            next(self)
