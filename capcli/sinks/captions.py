"""The captions file: which images it holds, and the rows that follow."""

from __future__ import annotations

from collections.abc import Iterator

from capcli.options import Format
from capcli.records import Caption
from capcli.sinks.formats import Csv, JsonCaptions, RowFields
from capcli.sinks.journal import Journal
from capcli.sinks.keys import Keys, key
from capcli.text import is_text


def rows_for(kind: Format, columns: RowFields) -> JsonCaptions | Csv:
    return Csv(columns, wide=False) if kind == "csv" else JsonCaptions(columns)


class CaptionFile:
    """Rows in a file that a later run goes on with. The order of calls is open, begin, start, write, close."""

    def __init__(self, path: str, kind: Format, columns: RowFields) -> None:
        self._journal = Journal(path, "--out")
        self._rows = rows_for(kind, columns)
        self.keys = Keys()

    def open(self, *, overwrite: bool) -> None:
        """Lock the file and read which names it holds; nothing on disk changes. Raises what Journal does."""
        self._journal.open()
        if overwrite:
            return
        if isinstance(self._rows, Csv) and self._journal.starts_with(self._rows.widened().header):
            self._rows = self._rows.widened()
        self.keys = Keys(self._journal.keys(self._rows))

    def last(self) -> tuple[int, list[str]] | None:
        """The key and the captions of the last image on record."""
        record = self._journal.last_record()
        return (key(self._rows.name(record)), self._rows.texts(record)) if record else None

    def begin(self, *, overwrite: bool) -> int:
        """Create, mend or empty the file; how many bytes were cut off."""
        return self._journal.begin(anew=overwrite)

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
        """Give every row the column for bytes, once, so that the table stays rectangular."""
        wide = rows.widened()

        def chunks() -> Iterator[bytes]:
            yield wide.header
            yield from map(Csv.widen, self._journal.records(rows))

        self._journal.replace(chunks())
        self._rows = wide
