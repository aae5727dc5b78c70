"""JSON: COCO's annotations and results, Karpathy's splits, TextCaps, captions by name, lists of objects, and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from capcli.annotations.rows import (
    BYTES_COLUMN,
    CAPTION_COLUMNS,
    CONVERSATION_COLUMNS,
    IMAGE_COLUMNS,
    REJECTED,
    REJECTED_COLUMN,
    SPLIT_COLUMNS,
    Annotations,
    ColumnNames,
    Row,
    caption_columns,
    captions_of,
    image_name,
    is_image,
    is_true,
    no_column,
    pick,
    readable_row,
    split_of,
)
from capcli.annotations.text_files import UNDECODED, decoded, line_fault, lines, parsed, readable
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.text import brief, printable

Object = Mapping[str, Any]
_LISTS = ("data", "annotations")  # keys of the only list in a document: TextCaps' is the first


def json_file(path: str, options: DataOptions) -> Annotations:
    """The annotations in a JSON file, whose content decides the format.

    Raises CapcliError, with the keys or types that were found, where it does not contain annotations.
    """
    with lines(path) as stream:
        first = next((line for line in stream if line.strip()), "")
        one_line = next((line for line in stream if line.strip()), None) is None
    try:
        entry = _line(first)
    except (ValueError, RecursionError):  # a document of several lines, unless it is damaged
        with readable(path), open(path, "rb") as file:
            content = decoded(file.read())
        try:
            return _document(path, parsed(content, path), options, damaged=UNDECODED.search(content) is not None)
        except CapcliError:
            entry = _second_line(path)
            if not isinstance(entry, dict):
                raise
            one_line = False
    if isinstance(entry, dict) and (not one_line or _is_row(entry, options)):
        rows = partial(_json_lines, path, options)
        return Annotations(path, "JSON lines", rows, os.path.dirname(path), tuple(entry))
    return _document(path, entry, options, damaged=UNDECODED.search(first) is not None)


def _line(line: str) -> Any:
    """The JSON on a line; a comma after it, as in a list, is left out. Raises ValueError and RecursionError."""
    return json.loads(line.strip().removesuffix(","))


def _second_line(path: str) -> object:
    """The JSON on the second line that is not blank; None if it is not JSON by itself."""
    with lines(path) as stream:
        _, line = next(filter(str.strip, stream), ""), next(filter(str.strip, stream), "")
    try:
        return _line(line)
    except (ValueError, RecursionError):
        return None


def _is_row(entry: Object, options: DataOptions) -> bool:
    """Whether the only object of a file is a row and not a document."""
    images = entry.get("images")
    if isinstance(images, list) and (not images or isinstance(images[0], dict)):
        return False
    return pick(list(entry), options.image_column, IMAGE_COLUMNS + CONVERSATION_COLUMNS) is not None


def _document(path: str, document: Any, options: DataOptions, *, damaged: bool) -> Annotations:
    """The annotations in a document; `damaged`: some of its text cannot be decoded."""
    found = _read_document(path, document, options)
    return replace(found, rows=partial(_decoded_rows, found.rows, path)) if damaged else found


def _decoded_rows(rows: Callable[[], Iterator[Row]], path: str) -> Iterator[Row]:
    """The rows; one whose name or captions are not UTF-8 as a fault."""
    for row in rows():
        if UNDECODED.search(json.dumps([row.name, row.captions], default=str, ensure_ascii=False)) is None:
            yield row
        else:
            wrong = f"the name or a caption of {brief(row.name)} is not UTF-8: convert the file to UTF-8"
            yield Row.unreadable(CapcliError(f"{printable(path)}: {wrong}"))


def _read_document(path: str, document: Any, options: DataOptions) -> Annotations:
    home = os.path.dirname(path)
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        return _images(path, document, options)
    if isinstance(document, dict):
        document = next((document[key] for key in _LISTS if isinstance(document.get(key), list)), document)
    if isinstance(document, list) and (not document or any(isinstance(entry, dict) for entry in document)):
        columns = next((tuple(entry) for entry in document if isinstance(entry, dict)), ())
        rows = partial(_objects, path, list(enumerate(document, 1)), options)
        if {"caption_str", "image_path"} <= set(columns):
            return Annotations(path, "TextCaps JSON", partial(_textcaps, rows), home, columns)
        kind = "COCO results" if {"image_id", "caption"} <= set(columns) else "JSON list"
        return Annotations(path, kind, rows, home, columns)
    if isinstance(document, dict) and _is_by_name(document, options):
        return Annotations(path, "JSON by name", partial(_by_name, path, document, options), home)
    raise CapcliError(
        f"{printable(path)} is JSON, but not COCO's or Karpathy's, a list of objects, or captions by image name: "
        f"it contains {_contents(document)}"
    )


def _textcaps(rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows with the folder of each path apart: the images may be in a folder of another name."""
    for row in rows():
        folder, _, name = row.name.rpartition("/")
        yield row._replace(name=name, folder=folder)


def _contents(document: object) -> str:
    if isinstance(document, dict):
        return "the keys " + ", ".join(map(repr, list(document)[:8])) if document else "nothing"
    if isinstance(document, list):
        return f"a list of {type(document[0]).__name__}" if document else "an empty list"
    return f"a {type(document).__name__}"


def _images(path: str, document: Object, options: DataOptions) -> Annotations:
    """COCO's layout, which STAIR and VizWiz use too, or Karpathy's."""
    home = os.path.dirname(path)
    images, faults = _all_objects(document["images"], path, "images")
    if any("sentences" in image for image in images):
        rows = partial(_karpathy, path, images, options)
        return Annotations(path, "Karpathy JSON", partial(_with_faults, faults, rows), home)
    if not isinstance(document.get("annotations"), list):
        raise CapcliError(
            f"{printable(path)} lists images without captions: it contains {_contents(document)}, no annotations"
        )
    annotations, more = _all_objects(document["annotations"], path, "annotations")
    key = options.caption_column or "caption"
    if annotations and not any(key in annotation for annotation in annotations):
        raise no_column(path, list(annotations[0]), options.caption_column, "caption", "--caption-column")
    rows = partial(_coco, path, images, annotations, key, options)
    return Annotations(path, "COCO annotations", partial(_with_faults, faults + more, rows), home)


def _all_objects(entries: list[Any], path: str, key: str) -> tuple[list[dict[str, Any]], list[CapcliError]]:
    """The objects of a list, and an error for each other entry."""
    faults = [
        CapcliError(f"{printable(path)}: {key}[{number}] is not an object, but {_contents(entry)}")
        for number, entry in enumerate(entries)
        if not isinstance(entry, dict)
    ]
    return [entry for entry in entries if isinstance(entry, dict)], faults


def _with_faults(faults: Sequence[CapcliError], rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    yield from map(Row.unreadable, faults)
    yield from rows()


def _coco(
    path: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]], key: str, options: DataOptions
) -> Iterator[Row]:
    captions: dict[str, list[object]] = {}
    rejected: set[str] = set()
    for position, annotation in enumerate(annotations):
        number = image_name(annotation.get("image_id"))
        if not number:
            wrong = f"{printable(path)}: annotations[{position}] has no image_id"
            yield Row.unreadable(CapcliError(wrong))
        elif is_true(annotation.get(REJECTED_COLUMN)):
            rejected.add(number)
        else:
            captions.setdefault(number, []).append(annotation.get(key))
    read_split = _split_reader(path, images, options)
    for image in images:
        number = image_name(image.get("id"))
        texts, remark = captions.pop(number, ()), REJECTED if number in rejected else ""
        tags = image.get(options.tags_column or "")
        try:
            yield Row(_coco_name(image, options) or number, texts, read_split(image), tags=tags, remark=remark)
        except CapcliError as error:
            yield Row.unreadable(error)
    for number, texts in captions.items():  # of images that are not listed: they have a number only
        yield Row(number, texts)


def _coco_name(image: Object, options: DataOptions) -> str:
    if options.image_column is not None and options.image_column in image:
        return image_name(image[options.image_column])
    url = str(image.get("coco_url") or image.get("flickr_url") or "")
    return image_name(image.get("file_name")) or url.rpartition("/")[2]


def _karpathy(path: str, images: list[dict[str, Any]], options: DataOptions) -> Iterator[Row]:
    read_split = _split_reader(path, images, options)
    for number, image in enumerate(images):
        try:
            yield _karpathy_row(path, number, image, read_split, options)
        except CapcliError as error:
            yield Row.unreadable(error)


def _karpathy_row(
    path: str, number: int, image: Object, read_split: Callable[[Object], str | None], options: DataOptions
) -> Row:
    column = pick(list(image), options.image_column, ("filename", "file_name"))
    if column is None:
        raise no_column(path, list(image), options.image_column, f"name of images[{number}]", "--image-column")
    captions = captions_of(image.get("sentences") or ())
    if options.caption_column is not None:
        captions = [text.get(options.caption_column) for text in captions if isinstance(text, dict)]
    folder, tags = str(image.get("filepath") or ""), image.get(options.tags_column or "")
    return Row(image_name(image[column]), captions, read_split(image), folder, tags=tags)


def _split_reader(path: str, images: Sequence[Object], options: DataOptions) -> Callable[[Object], str | None]:
    """A function that reads an object's split. Raises UsageError where the given key is in none of the objects."""
    key = options.split_column or "split"
    if options.split_column is not None and images and not any(key in image for image in images):
        raise no_column(path, list(images[0]), options.split_column, "split", "--split-column")
    return lambda image: split_of(image.get(key), path, strict=options.split_column is not None)


def _is_by_name(document: Object, options: DataOptions) -> bool:
    """Whether the keys are names and the values captions; a few values may be null or objects without a caption."""
    captioned = [name for name, value in document.items() if _has_captions(value, options)]
    others = [value for value in document.values() if not _has_captions(value, options)]
    mostly = len(captioned) > len(others) and all(isinstance(value, dict | None) for value in others)
    return bool(captioned) and (mostly or any(map(is_image, captioned)))


def _has_captions(value: object, options: DataOptions) -> bool:
    if isinstance(value, dict):
        return bool(caption_columns(list(value), options.caption_column))
    if isinstance(value, list):
        return all(isinstance(caption, str | None) for caption in value)
    return isinstance(value, str)


def _by_name(path: str, document: Object, options: DataOptions) -> Iterator[Row]:
    """Captions keyed by image name: {name: caption}, {name: [captions]}, or kohya's {name: {"caption": ...}}."""
    read_split = _split_reader(path, [value for value in document.values() if isinstance(value, dict)], options)
    for name, value in document.items():
        if not isinstance(value, dict):
            yield Row(name, captions_of(value))
            continue
        column = pick(list(value), options.caption_column, CAPTION_COLUMNS)
        tags = value.get(options.tags_column or "")
        try:
            yield Row(name, captions_of(value[column]) if column else (), read_split(value), tags=tags)
        except CapcliError as error:
            yield Row.unreadable(error)


def _json_lines(path: str, options: DataOptions) -> Iterator[Row]:
    with lines(path) as stream:
        entries = (
            (number, _entry(line, path, number))
            for number, line in enumerate(stream, 1)
            if line.strip() not in ("", "[", "]")
        )
        yield from _objects(path, entries, options)


def _entry(line: str, path: str, number: int) -> Any:
    """The JSON on a line, or the error where it is not JSON."""
    if (fault := line_fault(line, path, number)) is not None:
        return fault
    try:
        return parsed(line.rstrip().removesuffix(","), path, number)
    except CapcliError as error:
        return error


def _objects(path: str, entries: Iterable[tuple[int, Any]], options: DataOptions) -> Iterator[Row]:
    """Rows of objects, whose keys may differ: one that `capcli caption` wrote for a failure has no caption.

    An object that names no image becomes an unreadable row. Raises CapcliError where no object has a caption, or a split
    or tags column that was given.
    """
    layouts: dict[tuple[str, ...], ColumnNames] = {}
    for number, entry in entries:
        if not isinstance(entry, dict):
            wrong = f"{printable(path)}: line {number} is not an object, but {_contents(entry)}"
            yield Row.unreadable(entry if isinstance(entry, CapcliError) else CapcliError(wrong))
            continue
        keys = tuple(entry)
        columns = layouts.get(keys)
        if columns is None:
            try:
                columns = layouts[keys] = _columns(path, keys, options)
            except CapcliError as error:
                without = f"{printable(path)}: line {number} names no image; it contains {_contents(entry)}"
                yield Row.unreadable(CapcliError(without) if layouts else error)
                continue
        yield readable_row(entry, columns, f"{path}: line {number}", strict_split=options.split_column is not None)
    all_keys = list(dict.fromkeys(key for keys in layouts for key in keys))
    if layouts and not any(columns.captions for columns in layouts.values()):
        raise no_column(path, all_keys, options.caption_column, "caption", "--caption-column")
    if layouts and options.split_column is not None and not any(columns.split for columns in layouts.values()):
        raise no_column(path, all_keys, options.split_column, "split", "--split-column")
    if layouts and options.tags_column is not None and not any(columns.tags for columns in layouts.values()):
        raise no_column(path, all_keys, options.tags_column, "tags", "--tags-column")


def _columns(path: str, keys: Sequence[str], options: DataOptions) -> ColumnNames:
    image = pick(keys, options.image_column, IMAGE_COLUMNS + CONVERSATION_COLUMNS)
    if image is None and BYTES_COLUMN not in keys:
        raise no_column(path, keys, options.image_column, "image's name", "--image-column")
    captions = caption_columns(keys, options.caption_column)
    split, tags = pick(keys, options.split_column, SPLIT_COLUMNS), pick(keys, options.tags_column, ())
    return ColumnNames(image or BYTES_COLUMN, captions, split, tags, pick(keys, None, (REJECTED_COLUMN,)))
