"""Tables with a row per image or per caption: CSV and the like, Flickr's token files, and Parquet."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from capcli.annotations.rows import (
    BYTES_COLUMN,
    Annotations,
    ColumnNames,
    Row,
    object_row,
    raw_name,
    split_of,
)
from capcli.annotations.text_files import lines
from capcli.errors import CapcliError
from capcli.imports import importing
from capcli.options import DataOptions
from capcli.sources import IMAGE_SUFFIXES
from capcli.text import json_list, printable

_SEPARATORS = ("\t", ",", "|", ";")
# Characters. The csv module's limit applies to the whole process; a larger one does not affect other readers.
csv.field_size_limit(1 << 30)
_LONGEST = 50  # lines of one quoted cell; more mean that the quote was never closed
_BATCH = 1 << 14  # rows of a Parquet file in memory at a time
_SUFFIX = "(?i:" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"
_NUMBER = r"(?:#[A-Za-z]+)?#\d+"  # #0, or #zhc#0: the language, then the caption's number
# Names may contain blanks and '#': before a tab everything is the name; before a blank the name ends with an image suffix.
_TOKEN_LINES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"([^\t]+{_SUFFIX}){_NUMBER}\t(.*)",
        rf"(.+?{_SUFFIX}){_NUMBER}(?:[ \t]+(.*))?",
        rf"([^\t]+?){_NUMBER}\t(.*)",
        rf"(\S+?){_NUMBER}(?:[ \t]+(.*))?",
    )
)


@dataclass(frozen=True)
class TableLayout:
    """How lines are split into cells: `names` are the columns, `header` whether the file begins with them."""

    separator: str
    names: tuple[str, ...]
    header: bool
    columns: ColumnNames
    strict_split: bool

    @property
    def spaced(self) -> bool:
        """Whether a blank follows each separator; a quoted cell then begins after the blank."""
        return any(name.startswith(" ") for name in self.names[1:])


def text_table(path: str, first: str, options: DataOptions) -> Annotations | None:
    """The table that begins with the line `first`; None if it is not a table.

    Raises UsageError, or CapcliError with the columns that there are, for a table without the columns that are needed.
    """
    layout = _without_header(first, options) or _with_header(path, first, options)
    if layout is None:
        return None
    kind = {"\t": "TSV", ",": "CSV"}.get(layout.separator, f"table separated by {layout.separator!r}")
    rows = partial(_text_rows, path, layout)
    return Annotations(path, kind, rows, os.path.dirname(path), layout.names if layout.header else ())


def _cells(line: str, separator: str) -> list[str]:
    spaced = f"{separator} " in line
    return next(csv.reader([line], delimiter=separator, skipinitialspace=spaced), [])


def _with_header(path: str, first: str, options: DataOptions) -> TableLayout | None:
    tried: list[tuple[str, list[str]]] = []
    for separator in _SEPARATORS:
        names = next(csv.reader([first], delimiter=separator), [])
        if len(names) < 2:
            continue
        tried.append((separator, names))
        try:
            columns = ColumnNames.among(names, options, path)
        except CapcliError:
            continue
        return TableLayout(separator, tuple(names), True, columns, options.split_column is not None)
    if tried:  # raises the error for the separator that gives most columns
        ColumnNames.among(max((names for _, names in tried), key=len), options, path)
    return None


def _without_header(first: str, options: DataOptions) -> TableLayout | None:
    """The layout of a table without a header: columns are given by number, from 1, or the first line is an image's name
    and a text."""
    numbers = (options.image_column, options.caption_column)
    if all(number is not None and number.isdecimal() and number != "0" for number in numbers):
        image, caption = (int(str(number)) for number in numbers)
        for separator in _SEPARATORS:
            width = len(_cells(first, separator))
            if width >= max(image, caption):
                names = tuple(map(str, range(1, width + 1)))
                return TableLayout(
                    separator, names, False, ColumnNames(names[image - 1], names[caption - 1], None), False
                )
    if numbers == (None, None):
        for separator in _SEPARATORS:
            cells = _cells(first, separator)
            if len(cells) > 1 and _is_image(cells[0]) and not _is_image(cells[1]) and cells[1].strip():
                return TableLayout(separator, ("1", "2"), False, ColumnNames("1", "2", None), False)
    return None


def _is_image(cell: str) -> bool:
    return os.path.splitext(cell.strip())[1].lower() in IMAGE_SUFFIXES


def _text_rows(path: str, layout: TableLayout) -> Iterator[Row]:
    columns, names = layout.columns, layout.names
    image = names.index(columns.image)
    captions = [n for n, name in enumerate(names) if _folded(name) == _folded(columns.caption)]  # two may have one name
    split = None if columns.split is None else names.index(columns.split)
    tags = None if columns.tags is None else names.index(columns.tags)
    encoded = names.index(BYTES_COLUMN) if BYTES_COLUMN in names else None
    with lines(path) as stream:
        records = _records(stream, layout, path)
        for number, cells in islice(records, int(layout.header), None):
            if len(cells) != len(names):
                try:
                    cells = _fitted(cells, layout, captions[-1], path, number)
                except CapcliError as error:
                    yield Row.unreadable(error)
                    continue
            name = cells[image].strip() if layout.separator == "|" else cells[image]
            if encoded is not None and cells[encoded]:
                name = raw_name(cells[encoded], path)
            row_split = None if split is None else split_of(cells[split], path, strict=layout.strict_split)
            texts = [text for caption in captions for text in cell_captions(cells[caption])]
            yield Row(name, texts, row_split, tags=None if tags is None else cells[tags])


def _folded(name: str) -> str:
    return name.strip().casefold()


def _records(stream: Iterable[str], layout: TableLayout, path: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each record that is not blank, with the number of its first line."""
    record: list[str] = []

    def recorded() -> Iterator[str]:
        for line in stream:
            record.append(line)
            if len(record) > _LONGEST:
                break
            yield line

    number = 1
    reader = csv.reader(recorded(), delimiter=layout.separator, skipinitialspace=layout.spaced)
    try:
        for cells in reader:
            _refuse_unclosed(record, layout, path, number)
            if any(cell.strip() for cell in cells):
                yield number, cells
            number += len(record)
            record.clear()
    except csv.Error as error:
        raise CapcliError(f"{printable(path)}: line {number} is not a row of a table: {error}") from None


def _refuse_unclosed(record: Sequence[str], layout: TableLayout, path: str, number: int) -> None:
    """Raises CapcliError for a record with a quote that is never closed: it would include the rows after it."""
    if len(record) == 1 and record[0].count('"') % 2 == 0:
        return
    try:
        for _ in csv.reader(record, delimiter=layout.separator, skipinitialspace=layout.spaced, strict=True):
            pass
    except csv.Error as error:
        if "unexpected end" in str(error):
            raise CapcliError(f"{printable(path)}: line {number} opens a quote that is never closed") from None


def _fitted(cells: list[str], layout: TableLayout, caption: int, path: str, number: int) -> list[str]:
    """The record with as many cells as the header. Surplus cells are joined to the caption, if it is the last column: it
    contains separators and is not quoted."""
    width = len(layout.names)
    rest = cells[width:]
    if not any(cell.strip() for cell in rest):
        return cells[:width] + [""] * (width - len(cells))
    if caption == width - 1:
        return [*cells[:caption], layout.separator.join(cells[caption:])]
    raise CapcliError(
        f"{printable(path)}: line {number} has {len(cells)} cells where the header has {width} columns; "
        "quote the cells that contain a separator"
    )


def cell_captions(cell: str) -> Sequence[object]:
    """The captions in a cell: one, or those of a list in JSON."""
    listed = json_list(cell)
    return (cell,) if listed is None else listed


def token_file(path: str, first: str) -> Annotations | None:
    """The Flickr token file that begins with the line `first`; None if it is not one."""
    if _token_match(first) is None:
        return None
    return Annotations(path, "Flickr token file", partial(_token_rows, path), os.path.dirname(path))


def _token_match(line: str) -> re.Match[str] | None:
    return next(filter(None, (pattern.fullmatch(line) for pattern in _TOKEN_LINES)), None)


def _token_rows(path: str) -> Iterator[Row]:
    with lines(path) as stream:
        for number, line in enumerate(stream, 1):
            match = _token_match(line.rstrip("\r\n"))
            if match:
                yield Row(match[1], (match[2],))
            elif line.strip():
                wrong = f"line {number} is not like the others, 'name.jpg#0<tab>caption': {line.strip()[:60]!r}"
                yield Row.unreadable(CapcliError(f"{printable(path)}: {wrong}"))


def parquet_table(path: str, options: DataOptions) -> Annotations:
    """The table in a Parquet file; captions may be lists. Raises CapcliError as `text_table`, and without pyarrow."""
    with opened_parquet(path) as file:
        schema = file.schema_arrow
    columns = ColumnNames.among(schema.names, options, path)
    kind = schema.field(columns.image).type
    path_inside = "path" in _children(kind)
    images_inside = path_inside or is_bytes(kind)
    note = " with the images inside (to use them, save it with save_to_disk of datasets)" if images_inside else ""
    wanted = [f"{columns.image}.path" if path_inside else columns.image, columns.caption]
    more = (columns.split, columns.tags, BYTES_COLUMN)
    wanted += [name for name in more if name in schema.names and name is not None and name not in wanted]
    rows = partial(_parquet_rows, path, columns, wanted, strict_split=options.split_column is not None)
    return Annotations(path, f"Parquet{note}", rows, os.path.dirname(path), tuple(schema.names))


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type is one of bytes."""
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _children(kind: Any) -> list[str]:
    return [kind.field(index).name for index in range(kind.num_fields)]


def _parquet_rows(path: str, columns: ColumnNames, wanted: list[str], *, strict_split: bool) -> Iterator[Row]:
    with opened_parquet(path) as file:
        for batch in file.iter_batches(_BATCH, columns=wanted):
            for entry in batch.to_pylist():
                yield object_row(entry, columns, path, strict_split=strict_split)


@contextlib.contextmanager
def opened_parquet(path: str) -> Iterator[Any]:
    with arrow_errors(path):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            yield file


@contextlib.contextmanager
def arrow_errors(path: str) -> Iterator[None]:
    """A context in which errors of reading an Arrow or Parquet file, or a missing pyarrow, become CapcliError."""
    missing = f"{printable(path)} needs pyarrow: pip install 'capcli[train]'"
    with importing("pyarrow", "pyarrow", missing, "pip install --force-reinstall pyarrow"):
        import pyarrow
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise CapcliError(f"cannot read {printable(path)}: {' '.join(str(error).split())[:300]}") from None
