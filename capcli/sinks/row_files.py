"""The files of rows that a later run continues: captions, and the images that failed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from capcli.options import Format
from capcli.records import Caption, Failure
from capcli.sinks.journal import Journal
from capcli.sinks.keys import Keys, key
from capcli.sinks.row_formats import Csv, JsonLines, RowFields, failure_line, rows_for
from capcli.text import is_text, raw_bytes


class CaptionFile:
    """The captions file. The order of calls is open, begin, start, write, close; all raise what `Journal` raises."""

    def __init__(self, path: str, kind: Format, fields: RowFields) -> None:
        self._journal = Journal(path, "--out")
        self._rows = rows_for(kind, fields)
        self.keys = Keys()

    def open(self, *, overwrite: bool) -> None:
        """Lock the file and read the names in it; nothing on disk changes."""
        self._journal.open()
        if overwrite:
            return
        if isinstance(self._rows, Csv) and self._journal.starts_with(self._rows.widened().header):
            self._rows = self._rows.widened()
        self.keys = Keys(self._journal.keys(self._rows))

    def last(self) -> tuple[int, list[str]] | None:
        """The key and the captions of the last row; None where there is none."""
        record = self._journal.last_record()
        return (key(self._rows.name(record)), self._rows.texts(record)) if record else None

    def begin(self, *, overwrite: bool) -> int:
        """Create the file, cut off a torn row, or empty the file. Returns the number of bytes cut off."""
        return self._journal.begin(overwrite=overwrite)

    def start(self) -> None:
        """Write the header of a new file."""
        if self._journal.empty and self._rows.header:
            self._journal.append(self._rows.header)

    def write(self, caption: Caption) -> None:
        if isinstance(self._rows, Csv) and not self._rows.wide and not is_text(caption.name):
            self._widen(self._rows)
        self._journal.append(self._rows.line(caption))

    def close(self) -> None:
        self._journal.close()

    def _widen(self, rows: Csv) -> None:
        """Rewrite the file with the column for names that are not UTF-8, so that all rows have the same cells."""
        wide = rows.widened()

        def chunks() -> Iterator[bytes]:
            yield wide.header
            yield from map(Csv.widen, self._journal.records(rows))

        self._journal.replace(chunks())
        self._rows = wide


class FailureFile:
    """One row for each image that failed. The order of calls is open, begin, write or captioned, close.

    During a run rows are only appended. `close` removes superseded rows: those of images that have a caption now or
    that failed again. A run that is killed leaves them, and the next run removes them.
    """

    def __init__(self, path: str) -> None:
        self._journal = Journal(path, "--failures")
        self._rows = JsonLines(("file_name", "error", "message"))
        self._failed = Keys()
        self._captioned = Keys()  # a subset of `_failed`
        self._superseded = False
        self._begun = False

    def open(self, captioned: Keys, *, overwrite: bool) -> None:
        """Lock the file and read it; images in `captioned` have a caption. Nothing on disk changes."""
        self._journal.open()
        if overwrite:
            return
        for item in self._journal.keys(self._rows):
            self._superseded |= item in self._failed
            self._failed.add(item)
            if item in captioned:
                self.captioned(item)

    def __contains__(self, item: int) -> bool:
        return item in self._failed and item not in self._captioned

    def __len__(self) -> int:
        return len(self._failed) - len(self._captioned)

    def begin(self, *, overwrite: bool) -> int:
        """Cut off a torn row, or remove the file. Returns the number of bytes cut off."""
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

    def captioned(self, item: int) -> None:
        """Record that the image has a caption now."""
        if item in self._failed:
            self._captioned.add(item)
            self._superseded = True

    def close(self) -> None:
        """Remove superseded rows, in one replacement of the file, and close it."""
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
        """For each row, whether it is the last one of an image without a caption."""
        names = (self._rows.name(record) for record in self._journal.records(self._rows))
        keys = np.fromiter(map(key, names), np.uint64)
        kept = np.zeros(keys.size, np.bool_)
        _, from_end = np.unique(keys[::-1], return_index=True)
        for row in keys.size - 1 - from_end:
            kept[row] = int(keys[row]) not in self._captioned
        return kept
