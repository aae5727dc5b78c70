"""Rows on standard output: for a program when it is a pipe or a file, for a reader when it is a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable

from capcli.errors import CapcliError
from capcli.options import Format
from capcli.records import Caption
from capcli.sinks.captions import rows_for
from capcli.sinks.formats import Csv, RowFields
from capcli.text import is_text, printable


class ClosedPipeError(CapcliError):
    """Whoever read standard output has had enough: end quietly."""

    exit_code = 0


class Console:
    """Each row is out before the next is made. `kind` None: JSON lines, or readable lines on a terminal."""

    def __init__(self, kind: Format | None, columns: RowFields, warn: Callable[[str], None]) -> None:
        self._readable = kind is None and sys.stdout.isatty()
        self._rows = rows_for(kind or "jsonl", columns)
        self._warn = warn

    def start(self) -> None:
        """Write the header, where there is one."""
        if not self._readable and self._rows.header:
            self._out(self._rows.header)

    def write(self, caption: Caption) -> None:
        """Raises ClosedPipeError when nobody reads any more, CapcliError when the rows cannot be written."""
        if self._readable:
            lines = (f"{printable(caption.name)}  {printable(c.text)}\n" for c in caption.candidates)
            self._out("".join(lines).encode(sys.stdout.encoding, "backslashreplace"))
            return
        if isinstance(self._rows, Csv) and not is_text(caption.name):
            # Its column for bytes cannot be added to rows that are out, and few would want it always.
            self._warn(
                f"{printable(caption.name)}: CSV on standard output cannot carry this name's bytes; JSON lines can"
            )
        self._out(self._rows.line(caption))

    def _out(self, data: bytes) -> None:
        try:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as error:
            _let_go()
            # Windows says EINVAL for a closed pipe.
            if isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL):
                raise ClosedPipeError("standard output was closed") from None
            raise CapcliError(f"cannot write to standard output: {error.strerror or error}") from error


def _let_go() -> None:
    """What is left in the buffer goes nowhere: the interpreter would fail on it again at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
