"""Text and JSON files, read with errors that name the file and line."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from capcli.errors import CapcliError
from capcli.sources.lists import UTF16_MARKS
from capcli.text import printable

_HEAD = 1 << 16  # bytes from which a file's format is detected
_UNDECODED_UTF16 = "capcli-undecoded-utf-16"
codecs.register_error(_UNDECODED_UTF16, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]
UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as "surrogateescape" decodes it


def head(path: str) -> bytes:
    """The first bytes of a file."""
    with readable(path), open(path, "rb") as file:
        return file.read(_HEAD)


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """A context in which OSError of reading the file becomes CapcliError."""
    try:
        yield
    except OSError as error:
        raise CapcliError(f"cannot read {printable(path)}: {error.strerror or error}") from None


@contextlib.contextmanager
def lines(path: str) -> Iterator[IO[str]]:
    """The file's lines with their line ends: UTF-8 with or without a byte order mark, or UTF-16 with one.

    Lines end with LF or CR LF, or with CR where the file's beginning has no other line end. What cannot be decoded is lone
    surrogates in the line, which `line_fault` reports.
    """
    beginning = head(path)
    utf16 = beginning.startswith(UTF16_MARKS)
    encoding, errors = ("utf-16", _UNDECODED_UTF16) if utf16 else ("utf-8-sig", "surrogateescape")
    inner = beginning.decode(encoding, errors).strip("\r\n")
    newline = "\r" if "\r" in inner and "\n" not in inner else "\n"
    with readable(path), open(path, encoding=encoding, errors=errors, newline=newline) as text:
        yield text


def line_fault(line: str, path: str, number: int) -> CapcliError | None:
    """The error of line `number` where it has a NUL byte or cannot be decoded; None for any other line."""
    if "\0" in line:
        return CapcliError(f"{printable(path)}: line {number} has a NUL byte, which no text has")
    wrong = None if line.isascii() else UNDECODED.search(line)
    if wrong is None:
        return None
    following = line[wrong.start() : wrong.start() + 8].encode("utf-8", "surrogateescape")
    return CapcliError(f"{printable(path)}: line {number} is not UTF-8 ({following!r}): convert the file to UTF-8")


def parsed(text: str | bytes, path: str, number: int | None = None) -> Any:
    """The JSON in `text`, a whole file or its line `number`. Raises CapcliError with line and column where it is not JSON.

    Bytes in a file that are not UTF-8 are lone surrogates in the texts of the result.
    """
    if isinstance(text, bytes):
        text = decoded(text)
    where = printable(path) if number is None else f"{printable(path)}: line {number}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {number or error.lineno}, column {error.colno}"
        rest = len(text.strip()) - error.pos
        cut = "; it seems to be truncated" if rest <= 0 or "Unterminated" in error.msg else ""
        raise CapcliError(f"{printable(path)}: {place} is not JSON ({error.msg}){cut}") from None
    except ValueError:
        raise CapcliError(f"{where} has a number with too many digits") from None
    except RecursionError:
        raise CapcliError(f"{where} is not an annotation: its JSON is nested too deeply") from None


def decoded(content: bytes) -> str:
    """The text of a whole file, with lone surrogates for what cannot be decoded."""
    if content.startswith(UTF16_MARKS):
        return content.decode("utf-16", _UNDECODED_UTF16)
    return content.decode("utf-8-sig", "surrogateescape")
