"""JSON: COCO's annotations and results, Karpathy's splits, captions by image name, lists of objects, and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from capcli.annotations.rows import (
    BYTES_COLUMN,
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    SPLIT_COLUMNS,
    Annotations,
    ColumnNames,
    Row,
    captions_of,
    image_name,
    no_column,
    object_row,
    pick,
    split_of,
)
from capcli.annotations.text_files import lines, parsed, readable
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.text import printable

Object = Mapping[str, Any]


def json_file(path: str, options: DataOptions) -> Annotations:
    """The annotations in a JSON file, whose content decides the format.

    Raises CapcliError, with the keys or types that were found, where it does not contain annotations.
    """
    with lines(path) as stream:
        first = next((line for line in stream if line.strip()), "")
        one_line = next((line for line in stream if line.strip()), None) is None
    try:
        entry = json.loads(first)
    except (ValueError, RecursionError):  # a document of several lines, unless it is damaged
        with readable(path), open(path, "rb") as file:
            content = file.read()
        try:
            return _document(path, parsed(content, path), options)
        except CapcliError:
            entry = _second_line(path)
            if not isinstance(entry, dict):
                raise
            one_line = False
    if isinstance(entry, dict) and (not one_line or _is_row(entry, options)):
        rows = partial(_json_lines, path, options)
        return Annotations(path, "JSON lines", rows, os.path.dirname(path), tuple(entry))
    return _document(path, entry, options)


def _second_line(path: str) -> object:
    """The JSON on the second line that is not blank; None if it is not JSON by itself."""
    with lines(path) as stream:
        _, line = next(filter(str.strip, stream), ""), next(filter(str.strip, stream), "")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_row(entry: Object, options: DataOptions) -> bool:
    """Whether the only object of a file is a row and not a document."""
    return (
        not isinstance(entry.get("images"), list) and pick(list(entry), options.image_column, IMAGE_COLUMNS) is not None
    )


def _document(path: str, document: Any, options: DataOptions) -> Annotations:
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        return _images(path, document, options)
    if isinstance(document, list) and all(isinstance(entry, dict) for entry in document):
        columns = tuple(document[0]) if document else ()
        kind = "COCO results" if {"image_id", "caption"} <= set(columns) else "JSON list"
        rows = partial(_objects, path, list(enumerate(document, 1)), options)
        return Annotations(path, kind, rows, os.path.dirname(path), columns)
    if isinstance(document, dict) and document and all(_has_captions(value, options) for value in document.values()):
        return Annotations(path, "JSON by name", partial(_by_name, path, document, options), os.path.dirname(path))
    raise CapcliError(
        f"{printable(path)} is JSON, but not COCO's or Karpathy's, a list of objects, or captions by image name: "
        f"it contains {_contents(document)}"
    )


def _contents(document: object) -> str:
    if isinstance(document, dict):
        return "the keys " + ", ".join(map(repr, list(document)[:8])) if document else "nothing"
    if isinstance(document, list):
        return f"a list of {type(document[0]).__name__}" if document else "an empty list"
    return f"a {type(document).__name__}"


def _images(path: str, document: Object, options: DataOptions) -> Annotations:
    """COCO's layout, which STAIR uses too, or Karpathy's."""
    home = os.path.dirname(path)
    images = _all_objects(document["images"], path, "images")
    if any("sentences" in image for image in images):
        return Annotations(path, "Karpathy JSON", partial(_karpathy, path, images, options), home)
    if not isinstance(document.get("annotations"), list):
        raise CapcliError(
            f"{printable(path)} lists images without captions: it contains {_contents(document)}, no annotations"
        )
    annotations = _all_objects(document["annotations"], path, "annotations")
    key = options.caption_column or "caption"
    if annotations and not any(key in annotation for annotation in annotations):
        raise no_column(path, list(annotations[0]), options.caption_column, "caption", "--caption-column")
    return Annotations(path, "COCO annotations", partial(_coco, path, images, annotations, key, options), home)


def _all_objects(entries: list[Any], path: str, key: str) -> list[dict[str, Any]]:
    wrong = next((number for number, entry in enumerate(entries) if not isinstance(entry, dict)), None)
    if wrong is not None:
        raise CapcliError(f"{printable(path)}: {key}[{wrong}] is not an object, but {_contents(entries[wrong])}")
    return entries


def _coco(
    path: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]], key: str, options: DataOptions
) -> Iterator[Row]:
    captions: dict[str, list[object]] = {}
    for position, annotation in enumerate(annotations):
        if "image_id" not in annotation:
            raise CapcliError(f"{printable(path)}: annotations[{position}] has no image_id")
        captions.setdefault(str(annotation["image_id"]), []).append(annotation.get(key))
    split = _split_reader(path, images, options)
    for image in images:
        number = str(image.get("id"))
        name, texts = _coco_name(image, options) or number, captions.pop(number, ())
        yield Row(name, texts, split(image), tags=image.get(options.tags_column or ""))
    for number, texts in captions.items():  # of images that are not listed: they have a number only
        yield Row(number, texts)


def _coco_name(image: Object, options: DataOptions) -> str:
    if options.image_column is not None and options.image_column in image:
        return image_name(image[options.image_column])
    url = str(image.get("coco_url") or image.get("flickr_url") or "")
    return image_name(image.get("file_name")) or url.rpartition("/")[2]


def _karpathy(path: str, images: list[dict[str, Any]], options: DataOptions) -> Iterator[Row]:
    split = _split_reader(path, images, options)
    for number, image in enumerate(images):
        column = pick(list(image), options.image_column, ("filename", "file_name"))
        if column is None:
            raise no_column(path, list(image), options.image_column, f"name of images[{number}]", "--image-column")
        captions = captions_of(image.get("sentences") or ())
        if options.caption_column is not None:
            captions = [text.get(options.caption_column) for text in captions if isinstance(text, dict)]
        folder, tags = str(image.get("filepath") or ""), image.get(options.tags_column or "")
        yield Row(image_name(image[column]), captions, split(image), folder, tags=tags)


def _split_reader(path: str, images: Sequence[Object], options: DataOptions) -> Callable[[Object], str | None]:
    """A function that reads an object's split. Raises UsageError where the given key is in none of the objects."""
    key = options.split_column or "split"
    if options.split_column is not None and images and not any(key in image for image in images):
        raise no_column(path, list(images[0]), options.split_column, "split", "--split-column")
    return lambda image: split_of(image.get(key), path, strict=options.split_column is not None)


def _has_captions(value: object, options: DataOptions) -> bool:
    if isinstance(value, dict):
        return pick(list(value), options.caption_column, CAPTION_COLUMNS) is not None
    if isinstance(value, list):
        return all(isinstance(caption, str | None) for caption in value)
    return isinstance(value, str)


def _by_name(path: str, document: Object, options: DataOptions) -> Iterator[Row]:
    """Captions keyed by image name: {name: caption}, {name: [captions]}, or kohya's {name: {"caption": ...}}."""
    split = _split_reader(path, [value for value in document.values() if isinstance(value, dict)], options)
    for name, value in document.items():
        if isinstance(value, dict):
            column = pick(list(value), options.caption_column, CAPTION_COLUMNS)
            tags = value.get(options.tags_column or "")
            yield Row(name, captions_of(value.get(str(column))), split(value), tags=tags)
        else:
            yield Row(name, captions_of(value))


def _json_lines(path: str, options: DataOptions) -> Iterator[Row]:
    with lines(path) as stream:
        entries = ((number, _entry(line, path, number)) for number, line in enumerate(stream, 1) if line.strip())
        yield from _objects(path, entries, options)


def _entry(line: str, path: str, number: int) -> Any:
    """The JSON on a line, or the error where it is not JSON."""
    try:
        return parsed(line, path, number)
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
        yield object_row(entry, columns, path, strict_split=options.split_column is not None)
    all_keys = list(dict.fromkeys(key for keys in layouts for key in keys))
    if layouts and not any(columns.caption for columns in layouts.values()):
        raise no_column(path, all_keys, options.caption_column, "caption", "--caption-column")
    if layouts and options.split_column is not None and not any(columns.split for columns in layouts.values()):
        raise no_column(path, all_keys, options.split_column, "split", "--split-column")
    if layouts and options.tags_column is not None and not any(columns.tags for columns in layouts.values()):
        raise no_column(path, all_keys, options.tags_column, "tags", "--tags-column")


def _columns(path: str, keys: Sequence[str], options: DataOptions) -> ColumnNames:
    image = pick(keys, options.image_column, IMAGE_COLUMNS)
    if image is None and BYTES_COLUMN not in keys:
        raise no_column(path, keys, options.image_column, "image's name", "--image-column")
    caption = pick(keys, options.caption_column, CAPTION_COLUMNS)
    split, tags = pick(keys, options.split_column, SPLIT_COLUMNS), pick(keys, options.tags_column, ())
    return ColumnNames(image or BYTES_COLUMN, caption or "", split, tags)
