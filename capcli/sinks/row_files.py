"""The files of rows that a later run continues: captions, and the images that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from capcli.errors import ImageError
from capcli.options import Format
from capcli.records import Caption, Failure
from capcli.sinks.journal import Journal
from capcli.sinks.keys import Keys, key
from capcli.sinks.row_formats import LONGEST, Csv, JsonLines, RowFields, failure_line, rows_for
from capcli.text import is_text, raw_bytes

IsGone = Callable[[bytes], bool]


class CaptionFile:
    """The captions file. The order of calls is open, begin, start, line and append, settle, close.

    All raise what `Journal` raises. During a run rows are only appended. `settle` puts the new row of an image that was
    captioned again in the place of its old one.
    """

    def __init__(self, path: str, kind: Format, fields: RowFields) -> None:
        self._journal = Journal(path, "--out")
        self._rows = rows_for(kind, fields)
        self._dropped: set[int] = set()  # images whose rows are to be removed
        self._superseded = False
        self.keys = Keys()
        self.count = 0  # images with a row

    def open(self, *, overwrite: bool) -> None:
        """Lock the file and read the names in it; nothing on disk changes."""
        self._journal.open()
        if overwrite:
            return
        if isinstance(self._rows, Csv) and self._journal.starts_with(self._rows.widened().header):
            self._rows = self._rows.widened()
        self.keys = Keys(map(key, self._journal.names(self._rows)))
        self.count = len(self.keys)

    def begin(self, *, overwrite: bool) -> int:
        """Create the file, cut off a torn row, or empty the file. Returns the number of bytes cut off."""
        return self._journal.begin(overwrite=overwrite)

    def start(self) -> None:
        """Write the header of a new file."""
        if self._journal.empty and self._rows.header:
            self._journal.append(self._rows.header)

    def line(self, caption: Caption) -> bytes:
        """The row, for `append`. Raises ImageError for one that would be too long to be read again."""
        if isinstance(self._rows, Csv) and not self._rows.wide and not is_text(caption.name):
            self._widen(self._rows)
        line = self._rows.line(caption)
        if len(line) > LONGEST:
            raise ImageError("too-long", f"its row has {len(line):,} bytes, and a row has at most {LONGEST:,}")
        return line

    def append(self, item: int, line: bytes) -> None:
        """Append the row of an image. One that supersedes an earlier row is on disk when this returns."""
        self._journal.append(line)
        if item not in self.keys:
            self.count += 1
            return
        self._superseded = True
        self._journal.sync()

    def drop(self, item: int) -> None:
        """Have `settle` remove the row of an image, if it has one."""
        if item in self.keys and item not in self._dropped:
            self._dropped.add(item)
            self.count -= 1

    def names(self) -> Iterator[bytes]:
        """The raw names of the images with a row."""
        return map(self._rows.name, self._journal.records(self._rows))

    def gone(self, is_gone: IsGone) -> Iterator[int]:
        """The images with a row that are gone."""
        return (key(name) for name in self.names() if is_gone(name))

    def settle(self, *, superseded: bool = False) -> None:
        """Remove rows that were dropped or superseded, also by a run that was killed, in one replacement of the file."""
        if not (self._dropped or self._superseded or superseded):
            return
        places = self._latest()
        self._journal.replace(self._settled(places))
        self._dropped.clear()
        self._superseded = False

    def check(self) -> None:
        self._journal.check()

    def close(self) -> None:
        self._journal.close()

    def _latest(self) -> dict[int, tuple[int, int]]:
        """Where the last row of each image with several rows begins, and its size."""
        seen, latest = Keys(), {}
        end = len(self._rows.header)
        for record in self._journal.records(self._rows):
            item = key(self._rows.name(record))
            if item in seen:
                latest[item] = (end, len(record))
            seen.add(item)
            end += len(record)
        return latest

    def _settled(self, latest: dict[int, tuple[int, int]]) -> Iterator[bytes]:
        yield self._rows.header
        written: set[int] = set()
        for record in self._journal.records(self._rows):
            item = key(self._rows.name(record))
            if item in self._dropped or item in written:
                continue
            if item not in latest:
                yield record
                continue
            written.add(item)
            yield self._journal.record(*latest[item])

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
    that failed again. A run that is killed leaves them, and the next run removes them. `folders` are the names of folders that
    could not be listed.
    """

    def __init__(self, path: str, *, named: bool) -> None:
        self._journal = Journal(path, "--failures", named=named)
        self._rows = JsonLines(("file_name", "error", "message"))
        self._failed = Keys()
        self._captioned: set[int] = set()  # a subset of `_failed`
        self._superseded = False
        self._begun = False
        self.folders: set[bytes] = set()

    def open(self, captioned: Keys, *, overwrite: bool) -> None:
        """Lock the file and read it; images in `captioned` have a caption. Nothing on disk changes."""
        self._journal.open()
        if overwrite:
            return
        for name in self._journal.names(self._rows):
            item = key(name)
            self._superseded |= item in self._failed
            self._failed.add(item)
            if item in captioned:
                self.captioned(item)
            if name.endswith(b"/"):
                self.folders.add(name)

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
        self._captioned.discard(item)
        self._journal.append(failure_line(failure))

    def captioned(self, item: int) -> None:
        """Record that the image has a caption now, or that the folder can be listed, or that it is gone."""
        if item in self._failed:
            self._captioned.add(item)
            self._superseded = True

    def gone(self, is_gone: IsGone) -> Iterator[int]:
        """The images and folders that failed and are gone."""
        if not self._journal.exists:
            return
        for record in self._journal.records(self._rows):
            name = self._rows.name(record)
            if key(name) in self and is_gone(name.rstrip(b"/")):
                yield key(name)

    def close(self) -> None:
        """Remove superseded rows, in one replacement of the file, and close it."""
        try:
            if self._begun and self._superseded and self._journal.exists:
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
