"""Rows as bytes: JSON Lines, and CSV, plain or for spreadsheets. A later run reads the names in them."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from capcli.options import Format
from capcli.records import Caption, Facts, Failure
from capcli.text import as_text, is_text, raw_bytes

LONGEST = 1 << 26  # bytes; capcli writes no longer row
_BOM = b"\xef\xbb\xbf"  # from which spreadsheet programs know that the file is UTF-8
# The beginnings of cells that spreadsheet programs compute as formulas, after any apostrophes. One more apostrophe makes them
# text, and removing it gives the cell again.
_FORMULA = re.compile("'*[-=+@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_BARE = rb'"[^"\\\x00-\x1f]*"'  # a JSON string without escapes
_FLAT = rb"(?:%s|-?(?:0|[1-9]\d*)(?:\.\d+)?|null)" % _BARE


class ForeignRowError(ValueError):
    """A row that is complete, but that capcli did not write."""


class Rows(Protocol):
    """The format of one file: how to split it into records, and how to read a record's name. A header is not a record."""

    header: bytes
    headers: tuple[bytes, ...]  # every header that such a file may have: a torn header is a prefix of one
    first_bytes: bytes  # what such a file starts with

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The raw records in the lines of a file; the last may be torn."""

    def name(self, record: bytes) -> bytes:
        """The raw name in a record. Raises ValueError for an incomplete one, ForeignRowError for one of another program."""

    def may_be_torn(self, record: bytes) -> bool:
        """Whether a damaged last record may be the first part of a row, as a kill leaves it."""


@dataclass(frozen=True)
class RowFields:
    """The fields of a caption row: name, text and score; all candidates if requested; facts about the file."""

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
        return values | _facts(self.fields, caption.facts)


def _facts(fields: tuple[str, ...], facts: Facts) -> dict[str, str | int | None]:
    values: dict[str, str | int | None] = {}
    for name in fields:
        value = facts.get(name)
        values[name] = as_text(value) if isinstance(value, str) else value
    return values


def _rounded(score: float | None) -> float | None:
    return None if score is None or not math.isfinite(score) else round(score, 4) + 0.0  # + 0.0: no negative zero


def rows_for(kind: Format, fields: RowFields) -> JsonCaptions | Csv:
    return JsonCaptions(fields) if kind == "jsonl" else Csv(fields, wide=False, excel=kind == "csv-excel")


def failure_line(failure: Failure) -> bytes:
    """The row of an image that failed."""
    values = {"file_name": as_text(failure.name), "error": failure.error, "message": as_text(failure.message)}
    return json_line(failure.name, values)


def json_line(name: str, values: Mapping[str, Any]) -> bytes:
    """One JSON line; `file_name_bytes` in base64 is added for a name that is not UTF-8."""
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
    """One JSON object per line. Rows of capcli have all `required` keys, each with a string."""

    header = b""
    headers: tuple[bytes, ...] = (b"",)
    first_bytes = b'{"file_name": "'

    def __init__(self, required: tuple[str, ...]) -> None:
        self._required = required
        strings = b"".join(rb', "%s": %s' % (name.encode(), _BARE) for name in required if name != "file_name")
        other = rb'"(?!file_name|(?:%s)")\w+"' % "|".join(required).encode()
        self._usual = re.compile(rb'\{"file_name": (%s)%s(?:, %s: %s)*\}\n' % (_BARE, strings, other, _FLAT))

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        return iter(lines)

    def name(self, record: bytes) -> bytes:
        # A run that continues reads millions of rows; the JSON parser takes three times as long as this pattern.
        usual = self._usual.fullmatch(record)
        if usual and _is_utf8(record):
            return usual[1][1:-1]
        row = self._parsed(record)
        encoded = row.get("file_name_bytes")
        return base64.b64decode(encoded) if isinstance(encoded, str) else raw_bytes(row["file_name"])

    def may_be_torn(self, record: bytes) -> bool:
        return record.count(b"\n") < 2  # records are lines, so a damaged one never contains a whole row

    def _parsed(self, record: bytes) -> dict[str, Any]:
        if not record.endswith(b"\n"):
            raise ValueError("it does not end with a line break")
        try:
            row = json.loads(record.decode())
        except (ValueError, RecursionError):
            raise ValueError("it is not a JSON object") from None
        if not isinstance(row, dict):
            raise ValueError("it is not a JSON object")
        for required in self._required:
            if not isinstance(row.get(required), str):
                keys = ", ".join(map(repr, list(row)[:8])) or "nothing"
                raise ForeignRowError(f"a row has no text {required!r}, it has {keys}")
        return row


class JsonCaptions(JsonLines):
    """Captions as JSON lines."""

    def __init__(self, fields: RowFields) -> None:
        super().__init__(("file_name", "text"))
        self.fields = fields

    def line(self, caption: Caption) -> bytes:
        return json_line(caption.name, self.fields.values(caption))


_PLAIN = rb'[^",\r\n]*'
_QUOTED = rb'"[^"]*(?:""[^"]*)*"'
_CELL = rb"(%s|%s)" % (_PLAIN, _QUOTED)


class Csv:
    """One record per image under a header. A `wide` file has a last column with the bytes of names that are not UTF-8.

    For `excel` the file begins with a byte order mark, and no text is a formula.
    """

    def __init__(self, fields: RowFields, *, wide: bool, excel: bool = False) -> None:
        names = fields.names
        self.fields = fields
        self.wide = wide
        self._excel = excel
        start = _BOM if excel else b""
        self.headers: tuple[bytes, ...] = (start + csv_line(names), start + csv_line((*names, "file_name_bytes")))
        self.header = self.first_bytes = self.headers[wide]
        self._cells = len(names) + wide
        between = rb",(?:%s|%s)" % (_PLAIN, _QUOTED) * (self._cells - 2)
        self._record = re.compile(_CELL + between + b"," + _CELL + rb"\n")

    def widened(self) -> Csv:
        return Csv(self.fields, wide=True, excel=self._excel)

    @staticmethod
    def widen(record: bytes) -> bytes:
        """A record of a narrow file with an empty last cell."""
        return record.removesuffix(b"\n") + b",\n"

    def records(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        parts: list[bytes] = []
        size, quoted = 0, False
        for line in lines:
            parts.append(line)
            size += len(line)
            quoted ^= line.count(b'"') % 2 == 1
            if not quoted or size > LONGEST:
                yield b"".join(parts)
                parts, size, quoted = [], 0, False
        if parts:
            yield b"".join(parts)

    def name(self, record: bytes) -> bytes:
        found = self._record.fullmatch(record)
        if found is None:
            raise ValueError(f"it is not a CSV record of {self._cells} cells")
        record.decode()
        if self.wide and found[2]:
            return base64.b64decode(found[2], validate=True)
        name = found[1]
        name = name[1:-1].replace(b'""', b'"') if name.startswith(b'"') else name
        return name.decode().removeprefix("'").encode() if self._excel and _is_formula(name) else name

    def may_be_torn(self, record: bytes) -> bool:
        """False where the record contains a whole row: an unclosed quote includes it, which does not occur in a torn row."""
        return not any(self._is_row(line + b"\n") for line in record.split(b"\n")[1:-1])

    def _is_row(self, line: bytes) -> bool:
        """Whether the line has a name and another cell that is not empty; a name may itself contain lines of commas."""
        found = self._record.fullmatch(line)
        return found is not None and bool(found[1]) and bool(line[len(found[1]) :].strip(b",\n"))

    def line(self, caption: Caption) -> bytes:
        values = self.fields.values(caption)
        if self.fields.candidates:
            values["candidates"] = json.dumps(values["candidates"], ensure_ascii=False)
        if self._excel:
            values = {name: _harmless(value) if isinstance(value, str) else value for name, value in values.items()}
        cells = ["" if value is None else str(value) for value in values.values()]
        if self.wide:
            cells.append("" if is_text(caption.name) else _base64(caption.name))
        return csv_line(cells)


def _is_formula(name: bytes) -> bool:
    return _FORMULA.match(name.decode()) is not None


def _harmless(cell: str) -> str:
    """The cell as text for a spreadsheet program, with an apostrophe before what would be a formula."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def csv_line(cells: Iterable[str]) -> bytes:
    """A CSV record with minimal quoting. The csv module leaves a lone carriage return unquoted before Python 3.13."""
    quoted = ('"' + cell.replace('"', '""') + '"' if re.search('[",\r\n]', cell) else cell for cell in cells)
    return (",".join(quoted) + "\n").encode()
