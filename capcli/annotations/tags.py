"""Tags of images, such as keywords, from the metadata files beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from capcli.annotations.formats import METADATA, file_annotations
from capcli.annotations.name_matching import NameIndex
from capcli.errors import UsageError
from capcli.options import DataOptions
from capcli.progress import warn
from capcli.text import counted, printable, tag_text


class FolderTags:
    """The tags that one metadata file gives, by the absolute path of the image."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        self.tags = tags
        self._paths = NameIndex(tags)

    def of(self, path: str) -> str | None:
        """The tags of an image, None where it is not listed."""
        listed = self._paths.find(path)
        return None if listed is None else self.tags[listed]


class MetadataTags:
    """The tags of images, from `field` of the metadata file in the image's folder or the nearest folder above it that
    lists the image.

    A metadata file without the field is an error, unless another one with it was read before.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._known: dict[str, FolderTags | None] = {}
        self.found = 0  # images with tags

    def of(self, path: str) -> str:
        """The tags of one image, "" where it has none. Raises UsageError for metadata without the field."""
        image = os.path.abspath(path)  # a relative path may have fewer parts than there are folders to look in
        folder = os.path.dirname(image)
        while True:
            tags = self._tags(folder)
            text = None if tags is None else tags.of(image)
            if text is not None:
                self.found += bool(text)
                return text
            above = os.path.dirname(folder)
            if above == folder:
                return ""
            folder = above

    def _tags(self, folder: str) -> FolderTags | None:
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def _read(self, folder: str) -> FolderTags | None:
        path = next(filter(os.path.isfile, (os.path.join(folder, name) for name in METADATA)), None)
        if path is None:
            return None
        # the file need not have captions
        options = DataOptions(caption_column=self._field, tags_column=self._field)
        try:
            rows = list(file_annotations(path, options).rows())
        except UsageError:
            if any(
                known is not None and known.tags for known in self._known.values()
            ):  # unrelated metadata, in a folder further up
                return None
            raise
        faults = [row.fault for row in rows if row.fault is not None]
        if len(faults) == len(rows) and faults:
            raise faults[0]
        if faults:
            lost = f"{counted(len(faults), 'row')} of {printable(path)} cannot be read, so its images have no tags"
            warn(f"{lost}; the first: {faults[0]}")
        named = (row for row in rows if row.name and row.fault is None)
        return FolderTags({os.path.normpath(os.path.join(folder, row.name)): tag_text(row.tags) for row in named})
