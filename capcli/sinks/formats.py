"""Rows as bytes: JSON lines and CSV, written, told apart, and read back as far as a later run needs them."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from capcli.records import Caption, Facts
from capcli.text import as_text, is_text, raw_bytes

LONGEST = 1 << 22  # bytes of one row; what is longer was not written by this command
_BARE = rb'"[^"\\\x00-\x1f]*"'  # a JSON text in which nothing is escaped
_FLAT = rb"(?:%s|-?(?:0|[1-9]\d*)(?:\.\d+)?|null)" % _BARE


class ForeignRowError(ValueError):
    """A row that is whole, but not one of ours."""


class Rows(Protocol):
    """How the records of one file are told apart and which name each is about. A header is no record."""

    header: bytes
    headers: tuple[bytes, ...]  # every header such a file may have: a torn one is the beginning of any
    begin: bytes  # what a file of these begins with

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The raw records in lines of a file; the last may be torn."""

    def name(self, record: bytes) -> bytes:
        """The raw name a record is about; ValueError where it is not whole, ForeignRowError where it is not ours."""

    def may_be_torn(self, record: bytes) -> bool:
        """Whether a damaged last record may be the beginning of a row, as a kill leaves it."""


@dataclass(frozen=True)
class RowFields:
    """What a captions file holds for each image, apart from its name, caption and score."""

    candidates: bool
    fields: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return ("file_name", "text", "score", *(("candidates",) if self.candidates else ()), *self.fields)

    def values(self, caption: Caption) -> dict[str, Any]:
        values: dict[str, Any] = {
            "file_name": as_text(caption.name),
            "text": as_text(caption.text),
            "score": _rounded(caption.score),
        }
        if self.candidates:
            values["candidates"] = [{"text": as_text(c.text), "score": _rounded(c.score)} for c in caption.candidates]
        return values | _texts(self.fields, caption.facts)


def _texts(fields: tuple[str, ...], facts: Facts) -> dict[str, str | int | None]:
    values: dict[str, str | int | None] = {}
    for name in fields:
        value = facts.get(name)
        values[name] = as_text(value) if isinstance(value, str) else value
    return values


def _rounded(score: float) -> float | None:
    return round(score, 4) + 0.0 if math.isfinite(score) else None  # + 0.0: no negative zero


def json_line(name: str, values: Mapping[str, Any]) -> bytes:
    """One JSON line, with the name's bytes where text cannot carry them."""
    row = dict(values)
    if not is_text(name):
        row["file_name_bytes"] = _base64(name)
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _is_utf8(record: bytes) -> bool:
    try:
        record.decode()
    except UnicodeDecodeError:
        return False
    return True


def _base64(name: str) -> str:
    return base64.b64encode(raw_bytes(name)).decode("ascii")


class JsonLines:
    """One JSON object per line. `required` are the keys that make a row one of ours; all are texts."""

    header = b""
    headers: tuple[bytes, ...] = (b"",)
    begin = b'{"file_name": "'

    def __init__(self, required: tuple[str, ...]) -> None:
        self._required = required
        texts = b"".join(rb', "%s": %s' % (name.encode(), _BARE) for name in required if name != "file_name")
        other = rb'"(?!file_name|(?:%s)")\w+"' % "|".join(required).encode()
        self._usual = re.compile(rb'\{"file_name": (%s)%s(?:, %s: %s)*\}\n' % (_BARE, texts, other, _FLAT))

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        return iter(lines)

    def name(self, record: bytes) -> bytes:
        usual = self._usual.fullmatch(
            record
        )  # a run that goes on reads millions; to parse one takes three times as long
        if usual and _is_utf8(record):
            return usual[1][1:-1]
        row = self._parsed(record)
        encoded = row.get("file_name_bytes")
        return base64.b64decode(encoded) if isinstance(encoded, str) else raw_bytes(row["file_name"])

    def texts(self, record: bytes) -> list[str]:
        row = self._parsed(record)
        return [candidate["text"] for candidate in row.get("candidates", ())] or [row["text"]]

    def may_be_torn(self, record: bytes) -> bool:
        return record.count(b"\n") < 2  # lines are records, so that nothing whole hides in a damaged one

    def _parsed(self, record: bytes) -> dict[str, Any]:
        if not record.endswith(b"\n"):
            raise ValueError("it does not end with its line")
        try:
            row = json.loads(record.decode())
        except (ValueError, RecursionError):
            raise ValueError("it is no JSON object") from None
        if not isinstance(row, dict):
            raise ValueError("it is no JSON object")
        for required in self._required:
            if not isinstance(row.get(required), str):
                held = ", ".join(map(repr, list(row)[:8])) or "nothing"
                raise ForeignRowError(f"a row has no text {required!r}, it has {held}")
        return row


class JsonCaptions(JsonLines):
    """Captions as JSON lines."""

    def __init__(self, columns: RowFields) -> None:
        super().__init__(("file_name", "text"))
        self.columns = columns

    def line(self, caption: Caption) -> bytes:
        return json_line(caption.name, self.columns.values(caption))


_PLAIN = rb'[^",\r\n]*'
_QUOTED = rb'"[^"]*(?:""[^"]*)*"'
_CELL = rb"(%s|%s)" % (_PLAIN, _QUOTED)


class Csv:
    """One record per image under a header. When `wide`, a last column holds the bytes of names that are not UTF-8."""

    def __init__(self, columns: RowFields, *, wide: bool) -> None:
        names = columns.names
        self.columns = columns
        self.wide = wide
        self.headers: tuple[bytes, ...] = (csv_line(names), csv_line((*names, "file_name_bytes")))
        self.header = self.begin = self.headers[wide]
        cells = len(names) + wide
        self._record = re.compile(_CELL + rb",(?:%s|%s)" % (_PLAIN, _QUOTED) * (cells - 2) + b"," + _CELL + rb"\n")

    def widened(self) -> Csv:
        return Csv(self.columns, wide=True)

    @staticmethod
    def widen(record: bytes) -> bytes:
        """A narrow record with an empty last cell."""
        return record.removesuffix(b"\n") + b",\n"

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        held: list[bytes] = []
        size, quoted = 0, False
        for line in lines:
            held.append(line)
            size += len(line)
            quoted ^= line.count(b'"') % 2 == 1
            if not quoted or size > LONGEST:
                yield b"".join(held)
                held, size, quoted = [], 0, False
        if held:
            yield b"".join(held)

    def name(self, record: bytes) -> bytes:
        found = self._record.fullmatch(record)
        if found is None:
            raise ValueError(f"it is no CSV record of {len(self.columns.names) + self.wide} cells")
        record.decode()
        if self.wide and found[2]:
            return base64.b64decode(found[2], validate=True)
        name = found[1]
        return name[1:-1].replace(b'""', b'"') if name.startswith(b'"') else name

    def texts(self, record: bytes) -> list[str]:
        cells = next(csv.reader(io.StringIO(record.decode(), newline="")))
        if self.columns.candidates:
            return [candidate["text"] for candidate in json.loads(cells[3])]
        return [cells[1]]

    def may_be_torn(self, record: bytes) -> bool:
        """A quote that is never closed swallows what follows: a whole row in it was not part of one torn row."""
        return not any(self._is_row(line + b"\n") for line in record.split(b"\n")[1:-1])

    def _is_row(self, line: bytes) -> bool:
        """Whether it has a name and says something of it; commas alone may be part of an odd name."""
        found = self._record.fullmatch(line)
        return found is not None and bool(found[1]) and bool(line[len(found[1]) :].strip(b",\n"))

    def line(self, caption: Caption) -> bytes:
        values = self.columns.values(caption)
        if self.columns.candidates:
            values["candidates"] = json.dumps(values["candidates"], ensure_ascii=False)
        cells = ["" if value is None else str(value) for value in values.values()]
        if self.wide:
            cells.append("" if is_text(caption.name) else _base64(caption.name))
        return csv_line(cells)


def csv_line(cells: Iterable[str]) -> bytes:
    """Minimal quoting, done here because the csv module leaves a lone carriage return bare before Python 3.13."""
    quoted = ('"' + cell.replace('"', '""') + '"' if re.search('[",\r\n]', cell) else cell for cell in cells)
    return (",".join(quoted) + "\n").encode()
