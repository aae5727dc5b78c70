"""Tables with a row per image or per caption: CSV and the like, Flickr's token files, and Parquet."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from capcli.annotations.rows import (
    BYTES_COLUMN,
    REJECTED,
    Annotations,
    ColumnNames,
    Row,
    filled,
    folded,
    is_image,
    is_true,
    raw_name,
    readable_row,
    split_of,
)
from capcli.annotations.table_records import Dialect, TableReader
from capcli.annotations.text_files import line_fault, lines
from capcli.errors import CapcliError
from capcli.imports import importing
from capcli.options import DataOptions
from capcli.sources import IMAGE_SUFFIXES
from capcli.text import printable

_SEPARATORS = ("\t", ",", "|", ";")
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

    dialect: Dialect
    names: tuple[str, ...]
    header: bool
    columns: ColumnNames
    strict_split: bool = False

    @property
    def separator(self) -> str:
        return self.dialect.separator


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


def _with_header(path: str, first: str, options: DataOptions) -> TableLayout | None:
    tried: list[list[str]] = []
    for separator in _SEPARATORS:
        dialect = Dialect.of(first, separator)
        names = dialect.split(first).all
        if len(names) < 2:
            continue
        tried.append(names)
        try:
            columns = ColumnNames.among(names, options, path)
        except CapcliError:
            continue
        return TableLayout(dialect, tuple(names), True, columns, options.split_column is not None)
    if tried:  # raises the error for the separator that gives most columns
        ColumnNames.among(max(tried, key=len), options, path)
    return None


def _without_header(first: str, options: DataOptions) -> TableLayout | None:
    """The layout of a table without a header: columns are given by number, from 1, or the first line is an image's name
    and a text."""
    numbers = (options.image_column, options.caption_column)
    by_number = all(number is not None and number.isdecimal() and number != "0" for number in numbers)
    if not by_number and numbers != (None, None):
        return None
    for separator in _SEPARATORS:
        dialect = Dialect.of(first, separator)
        cells = dialect.split(first).all
        names = tuple(map(str, range(1, len(cells) + 1)))
        if by_number:
            image, caption = (int(str(number)) for number in numbers)
            if len(cells) >= max(image, caption):
                return TableLayout(dialect, names, False, ColumnNames(names[image - 1], (names[caption - 1],)))
        elif len(cells) > 1 and is_image(cells[0]) and not is_image(cells[1]) and cells[1].strip():
            return TableLayout(dialect, ("1", "2"), False, ColumnNames("1", ("2",)))
    return None


def _text_rows(path: str, layout: TableLayout) -> Iterator[Row]:
    row_of = RowOfCells.by(layout, path)
    with lines(path) as stream:
        records = TableReader(path, layout.dialect, row_of.is_row).records(stream)
        for number, cells in islice(records, int(layout.header), None):
            try:
                yield row_of(cells, number)
            except CapcliError as error:
                yield Row.unreadable(error)


@dataclass(frozen=True)
class RowOfCells:
    """Makes rows from the cells of records; the fields are the positions of the columns that are read."""

    path: str
    layout: TableLayout
    image: int
    captions: tuple[int, ...]
    split: int | None
    tags: int | None
    encoded: int | None  # the name in base64
    rejected: int | None

    @classmethod
    def by(cls, layout: TableLayout, path: str) -> RowOfCells:
        columns, names = layout.columns, layout.names
        of_captions = {folded(name) for name in columns.captions}

        def position(name: str | None) -> int | None:
            return names.index(name) if name in names else None

        return cls(
            path,
            layout,
            names.index(columns.image),
            tuple(n for n, name in enumerate(names) if folded(name) in of_captions),  # two may have one name
            position(columns.split),
            position(columns.tags),
            position(BYTES_COLUMN),
            position(columns.rejected),
        )

    def __call__(self, cells: list[str] | CapcliError, number: int) -> Row:
        """The row of a record. Raises CapcliError if it cannot be read."""
        if isinstance(cells, CapcliError):
            raise cells
        if len(cells) != len(self.layout.names):
            cells = self._fitted(cells, number)
        name = cells[self.image].strip() if self.layout.separator == "|" else cells[self.image]
        if self.encoded is not None and cells[self.encoded]:
            name = raw_name(cells[self.encoded], f"{self.path}: line {number}")
        split = None
        if self.split is not None:
            split = split_of(cells[self.split], f"{self.path}: line {number}", strict=self.layout.strict_split)
        tags = None if self.tags is None else cells[self.tags]
        if self.rejected is not None and is_true(cells[self.rejected]):
            return Row(name, (), split, tags=tags, remark=REJECTED)
        captions = [cells[caption] for caption in self.captions]
        return Row(name, filled(captions) if len(captions) > 1 else captions, split, tags=tags)

    def is_row(self, cells: list[str]) -> bool:
        """Whether a line within an open quote looks like a row itself, so that the quote is not the beginning of a cell.

        It has as many cells as the header and begins with the name of an image or, in a table that is usually not quoted,
        has anything in the image's column.
        """
        if len(cells) != len(self.layout.names):
            return False
        return is_image(cells[self.image]) or (self.layout.dialect.plain and bool(cells[self.image].strip()))

    def _fitted(self, cells: list[str], number: int) -> list[str]:
        """The record with as many cells as the header. Surplus cells are joined to the caption, if it is the last column:
        it contains separators and is not quoted."""
        layout, width = self.layout, len(self.layout.names)
        rest = cells[width:]
        if not any(cell.strip() for cell in rest):
            return cells[:width] + [""] * (width - len(cells))
        if self.captions[-1] == width - 1:
            return [*cells[: width - 1], layout.separator.join(cells[width - 1 :])]
        raise CapcliError(
            f"{printable(self.path)}: line {number} has {len(cells)} cells where the header has {width} columns; "
            "quote the cells that contain a separator"
        )


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
            if (fault := line_fault(line, path, number)) is not None:
                yield Row.unreadable(fault)
            elif match:
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
    wanted = [f"{columns.image}.path" if path_inside else columns.image, *columns.captions]
    more = (columns.split, columns.tags, columns.rejected, BYTES_COLUMN)
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
            names = batch.schema.names
            unlike = [name if name not in names[:n] else f"{name}\0{n}" for n, name in enumerate(names)]
            if unlike != names:  # columns of one name, of which an entry would have the last
                more = [other for other, name in zip(unlike, names, strict=True) if other != name in columns.captions]
                batch, columns = batch.rename_columns(unlike), columns.with_captions(more)
            for entry in batch.to_pylist():
                yield readable_row(entry, columns, path, strict_split=strict_split)


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
