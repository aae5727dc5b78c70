"""Text and JSON files, read with errors that name the file and line."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator
from typing import IO, Any

from capcli.errors import CapcliError
from capcli.text import printable

_HEAD = 1 << 16  # bytes from which a file's format is detected
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def head(path: str) -> bytes:
    """The first bytes of a file."""
    with readable(path), open(path, "rb") as file:
        return file.read(_HEAD)


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """A context in which OSError and UnicodeDecodeError of reading the file become CapcliError."""
    try:
        yield
    except UnicodeDecodeError:
        raise _not_utf8(path) from None
    except OSError as error:
        raise CapcliError(f"cannot read {printable(path)}: {error.strerror or error}") from None


@contextlib.contextmanager
def lines(path: str) -> Iterator[IO[str]]:
    """The file's lines with their line ends: UTF-8 with or without a byte order mark, or UTF-16 with one."""
    with readable(path):
        with open(path, "rb") as file:
            utf16 = file.read(2) in _UTF16
        with open(path, encoding="utf-16" if utf16 else "utf-8-sig", newline="") as text:
            yield text


def _not_utf8(path: str) -> CapcliError:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                wrong = line[error.start : error.start + 8]
                return CapcliError(
                    f"{printable(path)}: line {number} is not UTF-8 ({wrong!r}): convert the file to UTF-8"
                )
    return CapcliError(f"{printable(path)} is neither UTF-8 nor UTF-16: convert it to UTF-8")


def parsed(text: str | bytes, path: str, number: int | None = None) -> Any:
    """The JSON in `text`, a whole file or its line `number`. Raises CapcliError with line and column where it is not JSON."""
    try:
        with readable(path):
            return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {number or error.lineno}, column {error.colno}"
        rest = len(text.strip()) - error.pos if isinstance(text, str) else len(error.doc.strip()) - error.pos
        cut = "; it seems to be truncated" if rest <= 0 or "Unterminated" in error.msg else ""
        raise CapcliError(f"{printable(path)}: {where} is not JSON ({error.msg}){cut}") from None
    except RecursionError:
        raise CapcliError(f"{printable(path)} is not an annotation file: its JSON is nested too deeply") from None
