"""The images that could not be captioned: a file of their own, or lines for people."""

from __future__ import annotations

import numpy as np

from capcli.records import Failure
from capcli.sinks.formats import JsonLines, json_line
from capcli.sinks.journal import Journal
from capcli.sinks.keys import Keys, key
from capcli.text import as_text, raw_bytes


class FailureFile:
    """One row for each image that failed; one that is captioned later loses its row when the run ends.

    While a run goes on, rows are only appended: a kill leaves rows that have been superseded, by a caption or by a
    later row for the same name, and the next run takes them out.
    """

    def __init__(self, path: str) -> None:
        self._journal = Journal(path, "--failures")
        self._rows = JsonLines(("file_name", "error", "message"))
        self._failed = Keys()
        self._mended = Keys()
        self._superseded = False
        self._begun = False

    def open(self, captioned: Keys, *, overwrite: bool) -> None:
        """Lock the file and read it; names in `captioned` count as mended. Nothing on disk changes."""
        self._journal.open()
        if overwrite:
            return
        for item in self._journal.keys(self._rows):
            self._superseded |= item in self._failed
            self._failed.add(item)
            if item in captioned:
                self.mended(item)

    def __contains__(self, item: int) -> bool:
        return item in self._failed and item not in self._mended

    def __len__(self) -> int:
        return len(self._failed) - len(self._mended)

    def begin(self, *, overwrite: bool) -> int:
        """Cut off a torn tail, or remove the file; how many bytes were cut off."""
        self._begun = True
        if overwrite:
            self._journal.remove()
            return 0
        return self._journal.begin() if self._journal.exists else 0

    def write(self, failure: Failure) -> None:
        item = key(raw_bytes(failure.name))
        self._superseded |= item in self._failed
        self._failed.add(item)
        self._journal.append(failure_line(failure))

    def mended(self, item: int) -> None:
        """The image has a caption now."""
        if item in self._failed:
            self._mended.add(item)
            self._superseded = True

    def close(self) -> None:
        """Take out the rows that have been superseded, all at once, and let go of the file."""
        try:
            if self._begun and self._superseded:
                self._rewrite()
        finally:
            self._journal.close()

    def _rewrite(self) -> None:
        kept = self._kept()
        if not kept.any():
            self._journal.remove()
            return
        records = self._journal.records(self._rows)
        self._journal.replace(record for record, keep in zip(records, kept, strict=True) if keep)

    def _kept(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """For each row, whether it is the last word on an image without caption."""
        names = (self._rows.name(record) for record in self._journal.records(self._rows))
        keys = np.fromiter(map(key, names), np.uint64)
        kept = np.zeros(keys.size, np.bool_)
        _, from_end = np.unique(keys[::-1], return_index=True)
        for row in keys.size - 1 - from_end:
            kept[row] = int(keys[row]) not in self._mended
        return kept


def failure_line(failure: Failure) -> bytes:
    values = {"file_name": as_text(failure.name), "error": failure.error, "message": as_text(failure.message)}
    return json_line(failure.name, values)
