"""Images listed by name: in a file, or on standard input as the names arrive."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from capcli.errors import UsageError
from capcli.records import Entry
from capcli.text import printable

_CHUNK = 1 << 16
_LONGEST = 1 << 16  # bytes; no system supports paths of nearly this length, so the file is not a list of paths
_BYTE_ORDER_MARK = codecs.BOM_UTF8  # some editors write it at the start of UTF-8
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # PowerShell's > and Windows' editors write UTF-16


@dataclass(frozen=True, slots=True)
class ListFile:
    """A regular file of names, read again at each iteration."""

    path: str
    null: bool

    def __iter__(self) -> Iterator[Entry]:
        with _open(self.path) as stream:
            yield from read_list(stream, self.path, null=self.null)


@dataclass(frozen=True, slots=True)
class ListStream:
    """Names on standard input or another pipe, yielded as they arrive; can be iterated once."""

    stream: IO[bytes]
    path: str
    null: bool

    def __iter__(self) -> Iterator[Entry]:
        return read_list(self.stream, self.path, null=self.null)


def open_list(path: str, *, null: bool) -> ListFile | ListStream:
    """The list at `path`, `-` for standard input; raises UsageError if it cannot be read or is not a list."""
    if path == "-":
        if sys.stdin is None:
            raise UsageError("there is no standard input to read names from")
        # Unbuffered: a thread that waits for input would hold the buffer's lock, and the interpreter could not exit.
        return ListStream(getattr(sys.stdin.buffer, "raw", sys.stdin.buffer), "standard input", null)
    if os.path.isdir(path):
        raise UsageError(f"{printable(path)} is a folder: give it as a SOURCE, not as a list")
    stream = _open(path)
    if not os.path.isfile(path):  # a pipe such as <(find ...) can be read once, so it is opened once
        return ListStream(stream, path, null)
    with stream:
        beginning = stream.read(_CHUNK)
    if null or not beginning.startswith(UTF16_MARKS):
        _reject(beginning, path, null=null)
    return ListFile(path, null)


def read_list(stream: IO[bytes], path: str, *, null: bool) -> Iterator[Entry]:
    """Entries for the names in `stream`, each as soon as its separator has been read; raises UsageError.

    Lines end with LF or CR LF, or with CR alone where the first part that arrives has no LF, as old Mac files do.
    """
    separator = b"\0" if null else b"\n"
    rest, first = b"", True
    for chunk in _chunks(stream, path, null=null):
        if first and not null and b"\r" in chunk.rstrip(b"\r") and b"\n" not in chunk:
            separator = b"\r"
        *whole, rest = (rest + chunk).split(separator)
        if len(rest) > _LONGEST:
            raise UsageError(f"{printable(path)} is not a list of paths: one is longer than {_LONGEST} bytes")
        for name in whole:
            yield from _entry(name, path, null=null, first=first)
            first = False
    yield from _entry(rest, path, null=null, first=first)


def _chunks(stream: IO[bytes], path: str, *, null: bool) -> Iterator[bytes]:
    """The bytes of the stream as they arrive; lines in UTF-16, which its byte order mark shows, as UTF-8."""
    chunk = _read(stream, path)
    while len(chunk) == 1 and (more := _read(stream, path)):
        chunk += more
    is_utf16 = chunk.startswith(UTF16_MARKS) and not null
    decoder = codecs.getincrementaldecoder("utf-16")("replace") if is_utf16 else None
    while chunk:
        yield chunk if decoder is None else decoder.decode(chunk).encode()
        chunk = _read(stream, path)


def _entry(name: bytes, path: str, *, null: bool, first: bool) -> Iterator[Entry]:
    if first:
        name = name.removeprefix(_BYTE_ORDER_MARK)
    if not null:
        name = name.removesuffix(b"\r")
        _reject(name, path, null=null)
    if name:
        text = os.fsdecode(name)
        yield Entry(text, text)


def _reject(part: bytes, path: str, *, null: bool) -> None:
    if not null and b"\0" in part:
        raise UsageError(
            f"{printable(path)} contains NUL bytes: it is not a list, or its names are separated by NUL (give --null)"
        )


def _open(path: str) -> IO[bytes]:
    try:
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot read the list {printable(path)}: {reason}") from None


def _read(stream: IO[bytes], path: str) -> bytes:
    """The bytes that have arrived; waits only if there are none."""
    try:
        return stream.read(_CHUNK) or b""
    except OSError as error:
        raise UsageError(f"cannot read the list {printable(path)}: {error.strerror or error}") from None
