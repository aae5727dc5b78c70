"""Tags of images, such as keywords, from the metadata files beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from capcli.annotations.formats import METADATA, file_annotations
from capcli.errors import UsageError
from capcli.options import DataOptions
from capcli.text import tag_text


class MetadataTags:
    """The tags of images, from `field` of the metadata file in the image's folder or the nearest folder above it that
    lists the image.

    A metadata file without the field is an error, unless another one with it was read before.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._known: dict[str, Mapping[str, str] | None] = {}
        self.found = 0  # images with tags

    def of(self, path: str) -> str:
        """The tags of one image, "" where it has none. Raises UsageError for metadata without the field."""
        image = os.path.abspath(path)  # a relative path may have fewer parts than there are folders to look in
        folder = os.path.dirname(image)
        while True:
            tags = self._tags(folder)
            if tags is not None and image in tags:
                self.found += bool(tags[image])
                return tags[image]
            above = os.path.dirname(folder)
            if above == folder:
                return ""
            folder = above

    def _tags(self, folder: str) -> Mapping[str, str] | None:
        if folder not in self._known:
            self._known[folder] = self._read(folder)
        return self._known[folder]

    def _read(self, folder: str) -> Mapping[str, str] | None:
        path = next(filter(os.path.isfile, (os.path.join(folder, name) for name in METADATA)), None)
        if path is None:
            return None
        # the file need not have captions
        options = DataOptions(caption_column=self._field, tags_column=self._field)
        try:
            rows = [row for row in file_annotations(path, options).rows() if row.read().name]
        except UsageError:
            if any(self._known.values()):  # unrelated metadata, in a folder further up
                return None
            raise
        return {os.path.normpath(os.path.join(folder, row.name)): tag_text(row.tags) for row in rows}
