"""The images of a copy that `capcli prepare` wrote, as a source."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from capcli.errors import CapcliError, UsageError
from capcli.records import Entry, Stored
from capcli.sources.dataset_images import address_of, stored_columns
from capcli.text import printable

MANIFEST, SPLITS = "manifest.json", ("train", "val")
NAME, ENCODED_NAME = "file_name", "file_name_bytes"


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """The images of all splits, under the names that they have in the annotations.

    A name that another image of the copy has too is preceded by the split and the row: `val-7/dog.jpg`.
    """

    path: str
    splits: tuple[str, ...]

    @classmethod
    def of(cls, path: str) -> PreparedSource:
        """Raises UsageError where the copy is not finished."""
        if _manifest(path).get("state") != "finished":
            raise UsageError(
                f"{printable(path)} is a prepared copy that is not finished: run the same capcli prepare command again"
            )
        return cls(path, tuple(name for name in SPLITS if os.path.isdir(os.path.join(path, name))))

    def __iter__(self) -> Iterator[Entry]:
        listed: set[int] = set()
        for split in self.splits:
            folder = os.path.abspath(os.path.join(self.path, split))
            for row, cells in enumerate(stored_columns(folder, (NAME, ENCODED_NAME))):
                name = self._name(cells)
                if hash(name) in listed:
                    name = f"{split}-{row}/{name}"
                listed.add(hash(name))
                yield Entry(name, address_of(Stored(folder, row)))

    def _name(self, cells: dict[str, Any]) -> str:
        encoded = cells.get(ENCODED_NAME)
        try:
            return os.fsdecode(base64.b64decode(encoded)) if encoded else str(cells[NAME])
        except (ValueError, KeyError) as error:
            raise CapcliError(f"{printable(self.path)} is damaged: an image has no name that can be read") from error


def is_prepared(path: str) -> bool:
    """Whether `capcli prepare` wrote to the folder."""
    return {"state", "settings", "splits"} <= _manifest(path).keys()


def _manifest(path: str) -> dict[str, Any]:
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            manifest = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
