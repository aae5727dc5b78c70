"""Values of images, such as tags or keywords, from the metadata files beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

from capcli.annotations.formats import METADATA, file_annotations
from capcli.annotations.name_matching import NameIndex
from capcli.annotations.rows import Row, texts
from capcli.errors import UsageError
from capcli.options import DataOptions
from capcli.progress import warn
from capcli.text import counted, printable, tag_text

CAPTION = "caption"  # a field with this name is the caption, whatever its column is called


class FolderValues:
    """The values that one metadata file gives, by the absolute path of the image."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values
        self._paths = NameIndex(values)

    def of(self, path: str) -> str | None:
        """The value of an image, None where it is not listed."""
        listed = self._paths.find(path)
        return None if listed is None else self.values[listed]


class MetadataColumn:
    """The values of images in the column (or key) `field` of the metadata file in the image's folder or the nearest folder
    above it that lists the image. `as_text` turns a cell into text, "" for an empty one.

    A metadata file without the column is an error if the column is `required`, unless another one with it was read before;
    otherwise it is ignored.
    """

    def __init__(self, field: str, as_text: Callable[[object], str] = tag_text, *, required: bool = True) -> None:
        self._field, self._as_text, self._required = field, as_text, required
        self._known: dict[str, FolderValues | None] = {}
        self.found = 0  # images with a value

    def of(self, path: str) -> str:
        """The value of one image, "" where it has none. Raises UsageError for metadata without a required column."""
        image = os.path.abspath(path)  # a relative path may have fewer parts than there are folders to look in
        folder = os.path.dirname(image)
        while True:
            values = self._values(folder)
            text = None if values is None else values.of(image)
            if text is not None:
                self.found += bool(text)
                return text
            above = os.path.dirname(folder)
            if above == folder:
                return ""
            folder = above

    def _values(self, folder: str) -> FolderValues | None:
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def _read(self, folder: str) -> FolderValues | None:
        path = next(filter(os.path.isfile, (os.path.join(folder, name) for name in METADATA)), None)
        if path is None:
            return None
        try:
            cells = list(self._cells(path))
        except UsageError:
            if not self._required or any(
                known is not None and known.values for known in self._known.values()
            ):  # unrelated metadata, in a folder further up
                return None
            raise
        return FolderValues({os.path.normpath(os.path.join(folder, name)): self._as_text(cell) for name, cell in cells})

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
        """The readable rows with a name. Raises UsageError where none can be read; warns of others if the column is required."""
        rows = list(file_annotations(path, options).rows())
        faults = [row.fault for row in rows if row.fault is not None]
        if self._required and faults:
            if len(faults) == len(rows):
                raise faults[0]
            lost = f"{counted(len(faults), 'row')} of {printable(path)} cannot be read, so its images have no {self._field}"
            warn(f"{lost}; the first: {faults[0]}")
        return [row for row in rows if row.name and row.fault is None]
