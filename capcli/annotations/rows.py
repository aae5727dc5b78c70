"""The common form of all formats: rows of an image's name and captions; the interpretation of cells and columns."""

from __future__ import annotations

import base64
import binascii
import os
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Stored
from capcli.sources import IMAGE_SUFFIXES
from capcli.text import MISSING_TEXTS, clean, listed, printable

IMAGE_COLUMNS = (
    *("image", "file_name", "filename", "file", "path", "image_path", "image_name", "img"),
    *("image_file", "image_id", "img_id", "images"),
)
CAPTION_COLUMNS = (
    *("captions", "candidates", "sentences", "caption", "text", "title", "comment", "raw"),
    *("caption_str", "conversations", "messages"),  # TextCaps'; LLaVA's and chat templates'
)
CONVERSATION_COLUMNS = ("conversations", "messages")  # these may also name the image
SPLIT_COLUMNS = ("split", "set_name")  # TextCaps' is the second
REJECTED_COLUMN = "is_rejected"  # VizWiz's, of captions that the makers of the data do not use
BYTES_COLUMN = "file_name_bytes"  # a name that is not UTF-8, in base64, as capcli writes it
SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_LONGEST_NAME = 4096  # bytes, as Linux allows
_TEXT_KEYS = ("raw", "text", "caption")  # keys of the text in a caption that is an object
_SPEAKERS = ("from", "role")  # keys of who speaks in a conversation
_CAPTIONERS = ("gpt", "assistant", "model", "bot")
_NUMBERED = re.compile(r"(.*?)[ _.-]?\d+")  # caption_0, caption 1, caption2
REJECTED = "with captions marked as rejected, which are left out"


class Row(NamedTuple):
    """Captions of one image, as they are in the file; several rows may be about the same image.

    `folder` is the image's folder, relative to that of all images, if the annotations give it. `image` is set where they
    contain the image itself, and `identity` where something other than the name identifies it. `tags` is the cell of the
    tags column. `remark` is what the user should know about the row: "image" and a phrase that follows the word. `fault` is
    the error of a row that cannot be read; its other fields are empty, except `name` where it is known.
    """

    name: str
    captions: Sequence[object]
    split: str | None = None
    folder: str = ""
    image: Stored | None = None
    identity: Hashable = None
    tags: object = None
    remark: str = ""
    fault: CapcliError | None = None

    @classmethod
    def unreadable(cls, fault: CapcliError, name: str = "") -> Self:
        return cls(name, (), fault=fault)

    def read(self) -> Self:
        """The row itself. Raises its `fault`, if it has one."""
        if self.fault is not None:
            raise self.fault
        return self


@dataclass(frozen=True, eq=False)
class Annotations:
    """A file or folder of annotations: its path, the name of its format, its rows, and the folder its names are relative to.

    `columns` are those of the file, if it has any. `rows` gives a row with a `fault` for one that cannot be read, and
    raises CapcliError where the rows after it cannot be read either. `notes` are lines to show, which reading the rows adds.
    """

    path: str
    format: str
    rows: Callable[[], Iterator[Row]]
    home: str
    columns: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def texts(values: Iterable[object]) -> tuple[list[str], int]:
    """The captions among `values`, cleaned, and the number of empty ones (None, NaN, `nan` as text, or white space only).

    Surrounding white space is stripped and each line break becomes a space. A number becomes its digits. Of a list, an
    object or a text that is a printed list the captions in it count.
    """
    kept: list[str] = []
    empty = 0
    for value in _flat(values):
        text = "" if value is None or value != value else clean(str(value))  # NaN differs from itself
        if text and text not in MISSING_TEXTS:
            kept.append(text)
        else:
            empty += 1
    return kept, empty


def _flat(values: Iterable[object]) -> Iterator[object]:
    """The values, and in place of lists, objects and printed lists what they contain."""
    pending: list[Iterator[object]] = [iter(values)]
    while pending:
        value = next(pending[-1], pending)
        if value is pending:
            pending.pop()
            continue
        inside = _inside(value)
        if inside is None:
            yield value
        else:
            pending.append(iter(inside))


def _inside(value: object) -> Sequence[object] | None:
    """The items of a list, a printed list or a caption that is an object; None for a single value."""
    if isinstance(value, Mapping):
        if value and all(str(key).isdecimal() for key in value):  # a list as an object, with its positions as keys
            return list(value.values())
        return (next((value[key] for key in _TEXT_KEYS if key in value), None),)
    if isinstance(value, str):
        value = listed(value.strip())
    elif hasattr(value, "tolist"):  # a NumPy array
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return None
    return _replies(value) if _is_conversation(value) else value


def _is_conversation(value: Sequence[object]) -> bool:
    """Whether these are the turns of a conversation, as LLaVA's data and chat templates have them."""
    return bool(value) and all(isinstance(turn, Mapping) and any(key in turn for key in _SPEAKERS) for turn in value)


def _shown(turns: Sequence[Any]) -> str:
    """The name of the only image in the parts of a conversation's turns; "" where there is none, or several."""
    contents = (turn.get("content") for turn in turns)
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    names = {name for part in parts if isinstance(name := part.get("image") or part.get("path"), str)}
    return names.pop() if len(names) == 1 else ""


def _replies(turns: Sequence[Any]) -> Sequence[object]:
    """The first reply in a conversation: later ones answer questions about the image."""
    for turn in turns:
        if str(turn.get("from", turn.get("role"))) in _CAPTIONERS:
            content = turn.get("value", turn.get("content"))
            if isinstance(content, list):  # parts, of which some are text
                content = " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
            return (content,)
    return ()


def captions_of(value: object) -> Sequence[object]:
    """The cell of a caption column as a sequence: a list as it is, a single value as one item."""
    if hasattr(value, "tolist"):  # a NumPy array
        value = value.tolist()
    return value if isinstance(value, list | tuple) and not _is_conversation(value) else (value,)


def is_image(cell: str) -> bool:
    """Whether a cell is the name of an image file."""
    return os.path.splitext(cell.strip())[1].lower() in IMAGE_SUFFIXES


def is_true(value: object) -> bool:
    """Whether a cell, of any type, means true."""
    return value is not None and str(value).strip().casefold() in ("true", "1", "1.0", "yes")


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
    captions: tuple[str, ...]
    split: str | None = None
    tags: str | None = None
    rejected: str | None = None

    @classmethod
    def among(cls, names: Sequence[str], options: DataOptions, path: str) -> ColumnNames:
        """The columns to read of a table with columns `names`.

        Raises UsageError where a column in `options` does not exist, and CapcliError where none of the usual ones does.
        """
        image = pick(names, options.image_column, IMAGE_COLUMNS)
        captions = caption_columns(names, options.caption_column)
        if image is None:
            raise no_column(path, names, options.image_column, "image's name", "--image-column")
        if not captions:
            raise no_column(path, names, options.caption_column, "caption", "--caption-column")
        split, tags = split_column(names, options, path), tags_column(names, options, path)
        return cls(image, captions, split, tags, pick(names, None, (REJECTED_COLUMN,)))

    def with_captions(self, more: Iterable[str]) -> ColumnNames:
        """These columns and `more` columns of captions."""
        return replace(self, captions=tuple(dict.fromkeys((*self.captions, *more))))


def caption_columns(names: Sequence[str], given: str | None) -> tuple[str, ...]:
    """The columns of captions: the `given` one or, if None is given, one of a usual name and those numbered after it
    (`caption_0`, `caption_1`); empty where there is none."""
    found = pick(names, given, CAPTION_COLUMNS)
    if given is not None:
        return () if found is None else (found,)
    numbered: dict[str, list[str]] = {}
    for name in names:
        if (match := _NUMBERED.fullmatch(folded(name))) is not None:
            numbered.setdefault(match[1], []).append(name)
    if found is not None:
        return (found, *numbered.get(folded(found), ()))
    return tuple(next((numbered[name] for name in CAPTION_COLUMNS if name in numbered), ()))


def filled(cells: Sequence[object]) -> Sequence[object]:
    """The cells of several caption columns without those that are empty, as an image may have fewer captions; the first
    where all are."""
    return [cell for cell in cells if texts((cell,))[0]] or cells[:1]


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
    Case, surrounding blanks and the Unicode form are ignored."""
    if given is not None and given in names:
        return given
    first = {folded(name): name for name in reversed(names)}
    wanted = usual if given is None else (folded(given),)
    return next((first[name] for name in wanted if name in first), None)


def folded(name: str) -> str:
    """The name of a column as names are compared."""
    return unicodedata.normalize("NFC", name.strip().casefold())


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
    """The name in a cell of an image column, which may be an object with a path or a conversation; "" for none."""
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("file_name")
    if isinstance(value, list | tuple) and _is_conversation(value):
        return _shown(value)
    if isinstance(value, list | tuple) and len(value) == 1:
        return image_name(value[0])
    if isinstance(value, float) and value.is_integer():  # a number in a column with gaps, as pandas stores it
        value = int(value)
    if isinstance(value, bytes):  # a name, or the image itself, which gives no name
        return os.fsdecode(value) if len(value) <= _LONGEST_NAME and b"\0" not in value else ""
    return "" if value is None or value != value or isinstance(value, list | tuple) else str(value)


def _object_row(entry: Mapping[str, Any], columns: ColumnNames, path: str, *, strict_split: bool) -> Row:
    """An object as a row; `strict_split` as in `split_of`. Raises CapcliError where the row cannot be read."""
    encoded = entry.get(BYTES_COLUMN)
    name = raw_name(encoded, path) if encoded else image_name(entry.get(columns.image))
    split = split_of(entry.get(columns.split), path, strict=strict_split) if columns.split else None
    tags = entry.get(columns.tags) if columns.tags else None
    if columns.rejected is not None and is_true(entry.get(columns.rejected)):
        return Row(name, (), split, tags=tags, remark=REJECTED)
    cells = [entry[column] for column in columns.captions if column in entry]
    captions = captions_of(cells[0]) if len(cells) == 1 else filled(cells)
    return Row(name, captions, split, tags=tags)


def readable_row(entry: Mapping[str, Any], columns: ColumnNames, where: str, *, strict_split: bool) -> Row:
    """An object as a row, which has a fault where it cannot be read; `where` is the object's file and line."""
    try:
        return _object_row(entry, columns, where, strict_split=strict_split)
    except CapcliError as error:
        return Row.unreadable(error)
