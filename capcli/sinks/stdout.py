"""Rows on standard output: JSON Lines or CSV for a program, readable lines on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable

from capcli import console
from capcli.errors import CapcliError
from capcli.options import Format
from capcli.records import Caption
from capcli.sinks.row_formats import Csv, RowFields, rows_for
from capcli.text import is_text, printable

INDENT = "    "  # of a line that continues a row
MIN_COLUMNS = 8


class ClosedPipeError(CapcliError):
    """The reader of standard output closed it, as `head` does: the run ends without an error."""

    exit_code = 0


class Stdout:
    """Writes and flushes each row at once. `kind` None: readable lines on a terminal, JSON Lines otherwise.

    Rows on a terminal have escapes in place of control characters; in JSON those of JSON.
    """

    def __init__(self, kind: Format | None, fields: RowFields, warn: Callable[[str], None]) -> None:
        self._terminal = sys.stdout.isatty()
        self._readable = kind is None and self._terminal
        self._fields = fields
        self._rows = rows_for(kind or "jsonl", fields)
        self._warn = warn

    def start(self) -> None:
        """Write the header, if the format has one."""
        if not self._readable and self._rows.header:
            self._out(self._rows.header)

    def write(self, caption: Caption) -> None:
        """Raises ClosedPipeError when the reader has closed the pipe, CapcliError when the row cannot be written."""
        if self._readable:
            text = readable(caption, self._fields, shutil.get_terminal_size().columns)
            self._out(text.encode(sys.stdout.encoding, "backslashreplace"))
            return
        if isinstance(self._rows, Csv) and not is_text(caption.name):
            # Rows that are already written have no column for it, and few files need one.
            self._warn(
                f"{printable(caption.name)}: CSV on standard output cannot represent this name's bytes; JSON Lines can"
            )
        line = self._rows.line(caption)
        self._out(self._shown(line) if self._terminal else line)

    def _shown(self, line: bytes) -> bytes:
        text = line.decode().removesuffix("\n")
        if isinstance(self._rows, Csv):
            return f"{printable(text)}\n".encode()
        return ("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text) + "\n").encode()

    def _out(self, data: bytes) -> None:
        try:
            with console.hidden(console.SILENCE) if self._terminal else contextlib.nullcontext():
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        except OSError as error:
            _discard_buffer()
            if isinstance(error, BrokenPipeError):
                raise ClosedPipeError("standard output was closed") from None
            raise CapcliError(f"cannot write to standard output: {error.strerror or error}") from error


def readable(caption: Caption, fields: RowFields, columns: int) -> str:
    """The lines of a caption on a terminal of this width: each candidate with its score, the best also with the fields.

    Lines break between words, and those that continue a row are indented.
    """
    values = fields.values(caption)
    facts = [f"{name} {'unknown' if values[name] is None else printable(str(values[name]))}" for name in fields.fields]
    rows = []
    for number, candidate in enumerate(caption.candidates):
        notes = ", ".join([f"score {candidate.score:.2f}", *(facts if number == 0 else ())])
        rows.append(wrapped(f"{printable(caption.name)}  {printable(candidate.text)}  ({notes})", columns))
    return "".join(rows)


def wrapped(text: str, columns: int) -> str:
    """The text in lines of at most this many columns, which end between words where a word fits into a line."""
    from rich.cells import cell_len
    from rich.console import Console
    from rich.text import Text

    if cell_len(text) <= columns:
        return f"{text}\n"
    lines = Text(text).wrap(Console(width=columns), max(MIN_COLUMNS, columns - len(INDENT)))
    return "".join(f"{INDENT if number else ''}{line.plain.rstrip()}\n" for number, line in enumerate(lines))


def _discard_buffer() -> None:
    """Redirect the rest of the buffer to /dev/null: the interpreter would fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
