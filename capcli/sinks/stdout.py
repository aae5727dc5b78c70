"""Rows on standard output: JSON Lines or CSV for a program, readable lines on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable

from capcli.errors import CapcliError
from capcli.options import Format
from capcli.records import Caption
from capcli.sinks.row_formats import Csv, RowFields, rows_for
from capcli.text import is_text, printable


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
        self._rows = rows_for(kind or "jsonl", fields)
        self._warn = warn

    def start(self) -> None:
        """Write the header, if the format has one."""
        if not self._readable and self._rows.header:
            self._out(self._rows.header)

    def write(self, caption: Caption) -> None:
        """Raises ClosedPipeError when the reader has closed the pipe, CapcliError when the row cannot be written."""
        if self._readable:
            lines = (f"{printable(caption.name)}  {printable(c.text)}\n" for c in caption.candidates)
            self._out("".join(lines).encode(sys.stdout.encoding, "backslashreplace"))
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
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as error:
            _discard_buffer()
            if isinstance(error, BrokenPipeError):
                raise ClosedPipeError("standard output was closed") from None
            raise CapcliError(f"cannot write to standard output: {error.strerror or error}") from error


def _discard_buffer() -> None:
    """Redirect the rest of the buffer to /dev/null: the interpreter would fail to flush it at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
