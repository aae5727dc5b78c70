"""What every format is read into: rows that name an image and say captions of it, as the file says them."""

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
BYTES_COLUMN = "file_name_bytes"  # where capcli writes, in base64, a name that is not UTF-8
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LONGEST_NAME = 4096  # bytes, as Linux allows
_WITHIN = ("raw", "text", "caption")  # where an object that is a caption keeps its text


class Row(NamedTuple):
    """Captions of one image, uncleaned; several rows may be about the same image.

    `folder` is where below the images' folder the annotations say the image is. `image` is set where they hold the image
    itself, and `identity` where something better than the name tells one image from another. `tags` is what the column of
    tags holds. `fault` is the error of a row that cannot be read, which holds nothing else.
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
    def unread(cls, fault: CapcliError) -> Self:
        return cls("", (), fault=fault)

    def read(self) -> Self:
        """The row itself. Raises CapcliError for one that cannot be read."""
        if self.fault is not None:
            raise self.fault
        return self


@dataclass(frozen=True, eq=False)
class Annotations:
    """One file or folder of annotations, recognised: `format` in words, its rows, the folder its names are relative to.

    `columns` are those the file has. A row that cannot be read is among the rows where those after it can; else reading ends.
    """

    path: str
    format: str
    rows: Callable[[], Iterator[Row]]
    home: str
    columns: tuple[str, ...] = ()


def texts(values: Iterable[object]) -> tuple[list[str], int]:
    """The captions among `values`, clean, and how many were empty: nothing, or nothing but white space.

    Ends are stripped and line breaks become a space; nothing else is changed. A number is its digits.
    """
    kept: list[str] = []
    empty = 0
    for value in values:
        if type(value) is str:
            text = clean(value)
        elif isinstance(value, Mapping):
            inner, hollow = texts(_listed(next((value[key] for key in _WITHIN if key in value), None)))
            kept += inner
            empty += hollow
            continue
        elif value is None or value != value:  # a table's NaN is the only value that differs from itself
            text = ""
        else:
            text = clean(str(value))
        if text:
            kept.append(text)
        else:
            empty += 1
    return kept, empty


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list | tuple) else (value,)


def captions_of(value: object) -> Sequence[object]:
    """What a caption column holds of one image, as a sequence: a list, one caption, or nothing."""
    if hasattr(value, "tolist"):  # NumPy's array
        value = value.tolist()
    return _listed(value)


def split_of(word: object, path: str, *, said: bool) -> str | None:
    """train, val, test, or None for an empty cell; a word that is none of them is an error only where the user `said`
    that this column holds splits."""
    text = "" if word is None else str(word).strip().casefold()
    found = SPLITS.get(text)
    if found is None and text and said:
        raise CapcliError(f"{printable(path)}: {str(word)!r} is no split; known are {', '.join(SPLITS)}")
    return found


@dataclass(frozen=True, slots=True)
class ColumnNames:
    """Which columns, or keys, of a table hold what."""

    image: str
    caption: str
    split: str | None
    tags: str | None = None

    @classmethod
    def among(cls, names: Sequence[str], options: DataOptions, path: str) -> ColumnNames:
        """Those of a table with columns `names`; raises UsageError, or CapcliError where no usual one is there."""
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
    """The name among `names` that was given, or the first of the usual ones; capitals and blanks around do not count."""
    if given is not None and given in names:
        return given
    folded = {name.strip().casefold(): name for name in reversed(names)}
    wanted = usual if given is None else (given.strip().casefold(),)
    return next((folded[name] for name in wanted if name in folded), None)


def no_column(path: str, names: Sequence[str], given: str | None, what: str, flag: str) -> CapcliError:
    held = ", ".join(printable(name) for name in names[:20]) or "none"
    if given is not None:
        return UsageError(f"{printable(path)} has no column {given!r}; its columns: {held}")
    return CapcliError(f"{printable(path)}: which column holds the {what}? Say so with {flag}; its columns: {held}")


def raw_name(encoded: object, path: str) -> str:
    """The name whose bytes stand in base64 beside one that is not UTF-8."""
    try:
        return os.fsdecode(base64.b64decode(str(encoded), validate=True))
    except (binascii.Error, ValueError):
        raise CapcliError(
            f"{printable(path)}: {BYTES_COLUMN} holds {str(encoded)[:40]!r}, which is no base64"
        ) from None


def named(value: object) -> str:
    """An image's name as a file gives it; an image column may hold an object with a path."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("file_name")
    if isinstance(value, bytes):  # a name, as old writers keep texts, or the image itself, which names nothing
        return os.fsdecode(value) if len(value) <= _LONGEST_NAME and b"\0" not in value else ""
    return "" if value is None or value != value else str(value)


def object_row(entry: Mapping[str, Any], columns: ColumnNames, path: str, *, said: bool) -> Row:
    """The row that an object with these keys is."""
    encoded = entry.get(BYTES_COLUMN)
    name = raw_name(encoded, path) if encoded else named(entry.get(columns.image))
    captions = captions_of(entry[columns.caption]) if columns.caption in entry else ()
    split = split_of(entry.get(columns.split), path, said=said) if columns.split else None
    return Row(name, captions, split, tags=entry.get(columns.tags) if columns.tags else None)
