"""Datasets on disk, as `save_to_disk` of Hugging Face datasets and `capcli prepare` write them.

pyarrow reads memory-mapped files; the bytes of images are read only where images have neither name nor path.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from capcli.annotations.rows import (
    BYTES_COLUMN,
    IMAGE_COLUMNS,
    Annotations,
    Row,
    caption_columns,
    captions_of,
    filled,
    image_name,
    no_column,
    pick,
    raw_name,
    split_column,
    split_of,
    tags_column,
)
from capcli.annotations.tables import arrow_errors, is_bytes
from capcli.annotations.text_files import parsed, readable
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.records import Stored
from capcli.sources.dataset_images import open_arrow
from capcli.text import printable

_DICT, _STATE, _MANIFEST = "dataset_dict.json", "state.json", "manifest.json"
_BATCH = 1 << 14  # rows converted to Python objects at a time


def is_dataset(path: str) -> bool:
    """Whether the folder is a Dataset or DatasetDict on disk."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (_DICT, _STATE))


def stored_annotations(path: str, options: DataOptions) -> Annotations:
    """The dataset in the folder at `path`: a DatasetDict with its splits, or a single Dataset.

    Raises CapcliError where it is damaged, has no caption column, or pyarrow is missing.
    """
    folders = _splits(path)
    layouts = [_layout(folder, options) for folder, _ in folders]

    def rows() -> Iterator[Row]:
        for (folder, split), layout in zip(folders, layouts, strict=True):
            yield from _rows(folder, split, layout)

    return Annotations(path, "dataset on disk", rows, path, layouts[0].names)


def _splits(path: str) -> list[tuple[str, str | None]]:
    """The folder of each split, with "train", "val" or "test"; None for a split of another name."""
    whole = os.path.join(path, _DICT)
    if not os.path.isfile(whole):
        return [(path, None)]
    names = _json(whole).get("splits")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CapcliError(f"{printable(whole)} names no splits: the dataset is incomplete")
    return [(os.path.join(path, name), split_of(name, path, strict=False)) for name in names]


def _json(path: str) -> dict[str, Any]:
    with readable(path), open(path, "rb") as file:
        content = parsed(file.read(), path)
    if not isinstance(content, dict):
        raise CapcliError(f"{printable(path)} is not a JSON object: the dataset is damaged")
    return content


@dataclass(frozen=True)
class DatasetLayout:
    """The columns of a split that are read: `image` contains the images themselves, `name` their names."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    image: str | None
    name: str | None
    split: str | None
    tags: str | None
    strict_split: bool


def _layout(folder: str, options: DataOptions) -> DatasetLayout:
    schema = _table(folder).schema
    names = tuple(schema.names)
    captions = caption_columns(names, options.caption_column)
    if not captions:
        raise no_column(folder, names, options.caption_column, "caption", "--caption-column")
    files = [name for name in names if is_bytes(schema.field(name).type)]
    usual = pick(files, options.image_column, IMAGE_COLUMNS)
    pictures = [name for name in names if name == usual or _is_image_feature(schema.field(name).type)]
    given = pick(names, options.image_column, ())
    if options.image_column is not None and given is None:
        raise no_column(folder, names, options.image_column, "image", "--image-column")
    image = given if given in pictures else pick(pictures, None, IMAGE_COLUMNS) or next(iter(pictures), None)
    plain = [name for name in names if name not in (*pictures, *files, *captions)]
    name = given if given in plain else pick(plain, None, IMAGE_COLUMNS)
    if image is None and name is None and len(files) == 1:
        image = files[0]
    if image is None and name is None:
        raise no_column(folder, names, options.image_column, "image", "--image-column")
    split, tags = split_column(names, options, folder), tags_column(names, options, folder)
    return DatasetLayout(names, captions, image, name, split, tags, options.split_column is not None)


def _is_prepared(path: str) -> bool:
    manifest = os.path.join(path, _MANIFEST)
    return os.path.isfile(manifest) and {"state", "settings", "splits"} <= _json(manifest).keys()


def _is_image_feature(kind: Any) -> bool:
    """Whether an Arrow type is that of the Image feature: a struct of a file's bytes and its path."""
    fields = {kind.field(index).name for index in range(kind.num_fields)}
    return fields == {"bytes", "path"}


def _table(folder: str) -> Any:
    """The rows of a split on disk, as a table over memory-mapped files."""
    state = _json(os.path.join(folder, _STATE))
    files = [entry.get("filename") for entry in state.get("_data_files") or () if isinstance(entry, dict)]
    if not files:
        raise CapcliError(f"{printable(folder)} has no rows: its {_STATE} names no data files")
    return _mapped([os.path.join(folder, str(name)) for name in files])


def _mapped(paths: Sequence[str]) -> Any:
    """The rows of these Arrow files, memory-mapped."""
    with arrow_errors(paths[0]):
        import pyarrow
    tables = []
    for path in paths:
        with arrow_errors(path):
            tables.append(open_arrow(path).read_all())
    with arrow_errors(paths[0]):
        return pyarrow.concat_tables(tables)


def _indices(folder: str) -> Any:
    """The numbers on disk of the split's rows, in order, if `select`, `shuffle` or `filter` stored them; else None."""
    files = [entry.get("filename") for entry in _json(os.path.join(folder, _STATE)).get("_indices_files") or ()]
    return _mapped([os.path.join(folder, str(name)) for name in files]).column(0) if files else None


def _rows(folder: str, split: str | None, layout: DatasetLayout) -> Iterator[Row]:
    """The rows of one split, a batch at a time."""
    table, indices = _table(folder), _indices(folder)
    wanted = (*layout.captions, layout.name, layout.split, layout.tags, BYTES_COLUMN)
    plain = table.select([name for name in layout.names if name in wanted])
    pictures = None if layout.image is None else _Pictures(folder, table.column(layout.image), layout.image)
    if pictures is not None and layout.name is None:
        pictures.compare_bytes()
    total = table.num_rows if indices is None else len(indices)
    for start in range(0, total, _BATCH):
        count = min(_BATCH, total - start)
        chosen = range(start, start + count) if indices is None else indices.slice(start, count)
        batch = plain.slice(start, count) if indices is None else plain.take(chosen)
        columns = batch.to_pydict()
        captions = _captions([columns[name] for name in layout.captions])
        cells = columns[layout.split] if layout.split else [None] * count
        splits = [split_of(cell, folder, strict=layout.strict_split) or split for cell in cells]
        names = _names(folder, columns, layout.name) if layout.name else [""] * count
        if pictures is None:
            rows = map(Row, names, captions, splits)
        else:
            rows = map(pictures.row, range(start, start + count), names, captions, splits, *pictures.facts(chosen))
        if layout.tags is None:
            yield from rows
        else:
            yield from (row._replace(tags=tags) for row, tags in zip(rows, columns[layout.tags], strict=True))


def _captions(columns: Sequence[list[Any]]) -> Iterator[Sequence[object]]:
    """The captions of each row."""
    if len(columns) == 1:
        return map(captions_of, columns[0])
    return map(filled, zip(*columns, strict=True))


def _names(folder: str, columns: dict[str, list[Any]], name: str) -> list[str]:
    encoded = columns.get(BYTES_COLUMN) or [None] * len(columns[name])
    return [
        raw_name(raw, folder) if raw else image_name(value) for value, raw in zip(columns[name], encoded, strict=True)
    ]


class _Pictures:
    """The column of image files of one split; their lengths and paths are known without reading their bytes.

    Images without a name are identified by the path and the length of the file that they come from or, without a path, by
    their bytes: one photo with five captions in five rows is one image.
    """

    def __init__(self, folder: str, column: Any, name: str) -> None:
        import pyarrow
        from pyarrow import compute

        self._folder, self._column = folder, name
        bare = is_bytes(column.type)
        self._bytes = column if bare else compute.struct_field(column, "bytes")
        self._lengths = compute.binary_length(self._bytes)
        self._paths = pyarrow.nulls(len(column), pyarrow.string()) if bare else compute.struct_field(column, "path")
        self._digests: dict[int, bytes] = {}
        # Each row of capcli prepare is a separate image: train/1.jpg and val/1.jpg may both have the name 1.jpg.
        self._prepared = _is_prepared(os.path.dirname(os.path.normpath(folder)))

    def facts(self, chosen: Any) -> tuple[Sequence[int], Sequence[int | None], Sequence[str | None]]:
        """For these rows on disk their numbers, the lengths of their files (None: there is only a path), and their paths."""
        if isinstance(chosen, range):
            lengths, paths = (column.slice(chosen.start, len(chosen)) for column in (self._lengths, self._paths))
            return chosen, lengths.to_pylist(), paths.to_pylist()
        return chosen.to_pylist(), self._lengths.take(chosen).to_pylist(), self._paths.take(chosen).to_pylist()

    def compare_bytes(self) -> None:
        """Hashes the files without a path that have the same length as another: no others can be equal."""
        rows: dict[int, list[int]] = {}
        for number, length, path in zip(*self.facts(range(len(self._lengths))), strict=True):
            if length is not None and not path:
                rows.setdefault(length, []).append(number)
        for number in sorted(number for equal in rows.values() if len(equal) > 1 for number in equal):
            self._digests[number] = blake2b(self._bytes[number].as_buffer(), digest_size=16).digest()

    def row(
        self,
        row: int,
        name: str,
        captions: Sequence[object],
        split: str | None,
        number: int,
        length: int | None,
        path: str | None,
    ) -> Row:
        """Row `row` of the dataset, which is row `number` on disk."""
        if length is None:  # only a path, which is searched for like any other name
            return Row(path or name, captions, split)
        identity: Hashable = None
        if self._prepared:
            identity = (self._folder, number)
        elif not name:
            name = path or f"{os.path.basename(os.path.normpath(self._folder))}/{row}"
            identity = (path, length) if path else self._digests.get(number)
        return Row(name, captions, split, "", Stored(self._folder, row, self._column), identity)
