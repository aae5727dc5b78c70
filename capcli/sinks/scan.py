"""Reading what an earlier run left, up to where it was torn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from capcli.sinks.formats import LONGEST, ForeignRowError, Rows
from capcli.text import printable

_BLOCK = 1 << 18


class ForeignFileError(Exception):
    """A file that this command did not write, and what tells."""


class DamageError(Exception):
    """A damaged record with others behind it: no kill leaves that."""


class Record(NamedTuple):
    """A whole record: the raw name it is about (None: the header), where it begins and ends."""

    name: bytes | None
    begin: int
    end: int


def whole_records(stream: BinaryIO, rows: Rows) -> Iterator[Record]:
    """The header and all records before the torn tail, if any; raises ForeignFileError and DamageError.

    A torn tail is a last record that is not whole, and NULs in place of what was not on disk yet when the power went.
    """
    size = _size_without_nuls(stream)
    if not _passes_header(stream, rows, size):
        return
    end, line = len(rows.header), 1 + rows.header.count(b"\n")
    if end:
        yield Record(None, end, end)
    records = rows.records(lines(stream, size - end))
    for record in records:
        try:
            name = rows.name(record)
        except ValueError as error:
            foreign = isinstance(error, ForeignRowError)
            if not foreign and next(records, None) is None and _is_torn(rows, record, first=end == 0):
                return
            if end == 0:
                raise ForeignFileError(f"line 1: {error}") from None
            raise DamageError(f"line {line} is damaged: {error}") from None
        yield Record(name, end, end + len(record))
        end += len(record)
        line += record.count(b"\n")


def lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes by lines, none of them longer than a row can be."""
    while size > 0 and (line := stream.readline(min(size, LONGEST))):
        size -= len(line)
        yield line


def _passes_header(stream: BinaryIO, rows: Rows, size: int) -> bool:
    """Whether the header is there and read, rather than torn."""
    head = stream.read(min(size, max(map(len, rows.headers))))
    stream.seek(len(rows.header))
    if head.startswith(rows.header):
        return True
    if len(head) == size and any(header.startswith(head) for header in rows.headers):
        return False
    stream.seek(0)
    found = stream.readline(LONGEST).rstrip(b"\n").decode("utf-8", "replace")
    raise ForeignFileError(f"its columns are {printable(found[:200])!r}, not {rows.header.decode().rstrip()!r}")


def _is_torn(rows: Rows, record: bytes, *, first: bool) -> bool:
    """Whether a damaged last record is a torn one. A file of nothing else must begin as ours do, to be cut."""
    ours = not first or record.startswith(rows.begin) or rows.begin.startswith(record)
    return ours and rows.may_be_torn(record)


def _size_without_nuls(stream: BinaryIO) -> int:
    size = stream.seek(0, os.SEEK_END)
    while size:
        start = max(0, size - _BLOCK)
        stream.seek(start)
        size = start + len(stream.read(size - start).rstrip(b"\0"))
        if size > start:
            break
    stream.seek(0)
    return size
