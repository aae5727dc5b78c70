"""Tags of images from the metadata files beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from capcli.annotations.detection import file_annotations
from capcli.annotations.folders import METADATA
from capcli.errors import UsageError
from capcli.options import DataOptions
from capcli.text import tag_text


class MetadataTags:
    """The tags of images by their paths: of the `field` of the metadata file in the image's folder, or in one above it.

    Files without the field are passed over once one has been found that has it.
    """

    def __init__(self, field: str) -> None:
        self._field = field
        self._known: dict[str, Mapping[str, str] | None] = {}
        self.found = 0  # images with tags, so far

    def of(self, path: str) -> str:
        """Those of one image, nothing where it has none. Raises UsageError for metadata without the field."""
        image = os.path.abspath(path)  # as typed it may end below the folder that holds the metadata
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
        # a file that captions nothing yet has no column of captions
        options = DataOptions(caption_column=self._field, tags_column=self._field)
        try:
            named = [row for row in file_annotations(path, options).rows() if row.read().name]
        except UsageError:
            if any(self._known.values()):  # of something else, in a folder far above
                return None
            raise
        return {os.path.normpath(os.path.join(folder, row.name)): tag_text(row.tags) for row in named}
