"""The common form of all formats: rows of an image's name and captions; the interpretation of cells and columns."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Stored
from capcli.text import clean, printable

IMAGE_COLUMNS = (
    *("image", "file_name", "filename", "file", "path", "image_path", "image_name", "img"),
    *("image_file", "image_id", "img_id"),
)
CAPTION_COLUMNS = ("captions", "candidates", "sentences", "caption", "text", "title", "comment", "raw")
SPLIT_COLUMNS = ("split",)
BYTES_COLUMN = "file_name_bytes"  # a name that is not UTF-8, in base64, as capcli writes it
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LONGEST_NAME = 4096  # bytes, as Linux allows
_TEXT_KEYS = ("raw", "text", "caption")  # keys of the text in a caption that is an object


class Row(NamedTuple):
    """Captions of one image, as they are in the file; several rows may be about the same image.

    `folder` is the image's folder, relative to that of all images, if the annotations give it. `image` is set where they
    contain the image itself, and `identity` where something other than the name identifies it. `tags` is the cell of the
    tags column. `fault` is the error of a row that cannot be read; its other fields are empty.
    """

    name: str
    captions: Sequence[object]
    split: str | None = None
    folder: str = ""
    image: Stored | None = None
    identity: Hashable = None
    tags: object = None
    fault: CapcliError | None = None

    @classmethod
    def unreadable(cls, fault: CapcliError) -> Self:
        return cls("", (), fault=fault)

    def read(self) -> Self:
        """The row itself. Raises its `fault`, if it has one."""
        if self.fault is not None:
            raise self.fault
        return self


@dataclass(frozen=True, eq=False)
class Annotations:
    """A file or folder of annotations: its path, the name of its format, its rows, and the folder its names are relative to.

    `columns` are those of the file, if it has any. `rows` gives a row with a `fault` for one that cannot be read, and
    raises CapcliError where the rows after it cannot be read either.
    """

    path: str
    format: str
    rows: Callable[[], Iterator[Row]]
    home: str
    columns: tuple[str, ...] = ()


def texts(values: Iterable[object]) -> tuple[list[str], int]:
    """The captions among `values`, cleaned, and the number of empty ones (None, NaN, or white space only).

    Surrounding white space is stripped and each line break becomes a space. A number becomes its digits.
    """
    kept: list[str] = []
    empty = 0
    for value in values:
        if type(value) is str:
            text = clean(value)
        elif isinstance(value, Mapping):
            inner, inner_empty = texts(_as_sequence(next((value[key] for key in _TEXT_KEYS if key in value), None)))
            kept += inner
            empty += inner_empty
            continue
        elif value is None or value != value:  # NaN differs from itself
            text = ""
        else:
            text = clean(str(value))
        if text:
            kept.append(text)
        else:
            empty += 1
    return kept, empty


def _as_sequence(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)


def captions_of(value: object) -> Sequence[object]:
    """The cell of a caption column as a sequence: a list as it is, a single value as one item."""
    if hasattr(value, "tolist"):  # a NumPy array
        value = value.tolist()
    return _as_sequence(value)


def split_of(value: object, path: str, *, strict: bool) -> str | None:
    """ "train", "val" or "test" for a cell of a split column, None for an empty one.

    Any other value is None too, or with `strict`, for a column that the user named, raises CapcliError.
    """
    text = "" if value is None else str(value).strip().casefold()
    split = SPLITS.get(text)
    if split is None and text and strict:
        raise CapcliError(f"{printable(path)}: {str(value)!r} is not a split; known are {', '.join(SPLITS)}")
    return split


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """The columns of a table, or keys of an object, that are read."""

    image: str
    caption: str
    split: str | None
    tags: str | None = None

    @classmethod
    def among(cls, names: Sequence[str], options: DataOptions, path: str) -> ColumnNames:
        """The columns to read of a table with columns `names`.

        Raises UsageError where a column in `options` does not exist, and CapcliError where none of the usual ones does.
        """
        image = pick(names, options.image_column, IMAGE_COLUMNS)
        caption = pick(names, options.caption_column, CAPTION_COLUMNS)
        if image is None:
            raise no_column(path, names, options.image_column, "image's name", "--image-column")
        if caption is None:
            raise no_column(path, names, options.caption_column, "caption", "--caption-column")
        return cls(image, caption, split_column(names, options, path), tags_column(names, options, path))


def split_column(names: Sequence[str], options: DataOptions, path: str) -> str | None:
    found = pick(names, options.split_column, SPLIT_COLUMNS)
    if found is None and options.split_column is not None:
        raise no_column(path, names, options.split_column, "split", "--split-column")
    return found


def tags_column(names: Sequence[str], options: DataOptions, path: str) -> str | None:
    found = pick(names, options.tags_column, ())
    if found is None and options.tags_column is not None:
        raise no_column(path, names, options.tags_column, "tags", "--tags-column")
    return found


def pick(names: Sequence[str], given: str | None, usual: Sequence[str]) -> str | None:
    """The `given` name as `names` spells it or, if None is given, the first of the `usual` ones; None where there is none.
    Case and surrounding blanks are ignored."""
    if given is not None and given in names:
        return given
    folded = {name.strip().casefold(): name for name in reversed(names)}
    wanted = usual if given is None else (given.strip().casefold(),)
    return next((folded[name] for name in wanted if name in folded), None)


def no_column(path: str, names: Sequence[str], given: str | None, what: str, flag: str) -> CapcliError:
    columns = ", ".join(printable(name) for name in names[:20]) or "none"
    if given is not None:
        return UsageError(f"{printable(path)} has no column {given!r}; its columns: {columns}")
    return CapcliError(
        f"{printable(path)}: no column has a usual name for the {what}: give it with {flag}; its columns: {columns}"
    )


def raw_name(encoded: object, path: str) -> str:
    """The name in a cell of BYTES_COLUMN. Raises CapcliError where it is not base64."""
    try:
        return os.fsdecode(base64.b64decode(str(encoded), validate=True))
    except (binascii.Error, ValueError):
        raise CapcliError(f"{printable(path)}: {BYTES_COLUMN} has {str(encoded)[:40]!r}, which is not base64") from None


def image_name(value: object) -> str:
    """The name in a cell of an image column, which may be an object with a path; "" where there is none."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("file_name")
    if isinstance(value, bytes):  # a name, or the image itself, which gives no name
        return os.fsdecode(value) if len(value) <= _LONGEST_NAME and b"\0" not in value else ""
    return "" if value is None or value != value else str(value)


def object_row(entry: Mapping[str, Any], columns: ColumnNames, path: str, *, strict_split: bool) -> Row:
    """An object as a row; `strict_split` as in `split_of`."""
    encoded = entry.get(BYTES_COLUMN)
    name = raw_name(encoded, path) if encoded else image_name(entry.get(columns.image))
    captions = captions_of(entry[columns.caption]) if columns.caption in entry else ()
    split = split_of(entry.get(columns.split), path, strict=strict_split) if columns.split else None
    return Row(name, captions, split, tags=entry.get(columns.tags) if columns.tags else None)
