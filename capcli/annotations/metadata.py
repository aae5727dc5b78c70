"""Values of images, such as tags or keywords, from the metadata files beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from capcli.annotations.formats import METADATA, file_annotations
from capcli.annotations.rows import Row, texts
from capcli.errors import UsageError
from capcli.options import DataOptions
from capcli.text import tag_text

CAPTION = "caption"  # a field with this name is the caption, whatever its column is called


class MetadataColumn:
    """The values of images in the column (or key) `field` of the metadata file in the image's folder or the nearest folder
    above it that lists the image. `as_text` turns a cell into text, "" for an empty one.

    A metadata file without the column is an error if the column is `required`, unless another one with it was read before;
    otherwise it is ignored.
    """

    def __init__(self, field: str, as_text: Callable[[object], str] = tag_text, *, required: bool = True) -> None:
        self._field, self._as_text, self._required = field, as_text, required
        self._known: dict[str, Mapping[str, str] | None] = {}
        self.found = 0  # images with a value

    def of(self, path: str) -> str:
        """The value of one image, "" where it has none. Raises UsageError for metadata without a required column."""
        image = os.path.abspath(path)  # a relative path may have fewer parts than there are folders to look in
        folder = os.path.dirname(image)
        while True:
            values = self._values(folder)
            if values is not None and image in values:
                self.found += bool(values[image])
                return values[image]
            above = os.path.dirname(folder)
            if above == folder:
                return ""
            folder = above

    def _values(self, folder: str) -> Mapping[str, str] | None:
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def _read(self, folder: str) -> Mapping[str, str] | None:
        path = next(filter(os.path.isfile, (os.path.join(folder, name) for name in METADATA)), None)
        if path is None:
            return None
        try:
            cells = list(self._cells(path))
        except UsageError:
            if not self._required or any(self._known.values()):  # unrelated metadata, in a folder further up
                return None
            raise
        return {os.path.normpath(os.path.join(folder, name)): self._as_text(cell) for name, cell in cells}

    def _cells(self, path: str) -> Iterator[tuple[str, object]]:
        """The name and the cell of each image in a metadata file. Raises UsageError where it has no such column."""
        try:
            # the file need not have captions
            options = DataOptions(caption_column=self._field, tags_column=self._field)
            yield from [(row.name, row.tags) for row in self._rows(path, options)]
        except UsageError:
            if self._required or self._field != CAPTION:
                raise
            yield from ((row.name, next(iter(texts(row.captions)[0]), "")) for row in self._rows(path, DataOptions()))

    def _rows(self, path: str, options: DataOptions) -> list[Row]:
        """The rows with a name. An unreadable row is an error if the column is required, and ignored otherwise."""
        rows = file_annotations(path, options).rows()
        return [row for row in rows if (row.read() if self._required else row).name]
