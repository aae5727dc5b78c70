"""How many images and captions there are, and what was left out: as counts, one line of text, and a JSON lines file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from capcli.errors import CapcliError
from capcli.records import Annotated, Failure
from capcli.sinks.row_formats import failure_line
from capcli.storage import atomic
from capcli.text import as_text, counted, printable

# kinds of failures; any other kind is an image that cannot be decoded
MISSING, EMPTY, WITHOUT, UNREAD = "missing", "empty-caption", "no-caption", "unreadable-row"


@dataclass
class DataReport:
    """Counts of images and captions that can be used, and a failure for each one left out.

    A failure's `error` is `missing` (no such file), `empty-caption` (one per caption), `no-caption` (the annotations list
    the image without a caption), `unreadable-row` (its `name` is the annotation file, or the image whose text file cannot be
    read), or why the image cannot be decoded.
    `notes` are warnings to show, such as names in a list that the data lack. `fault` is the error of the first row that
    cannot be read, `written` the path of the failures once they are written.
    """

    images: int = 0
    captions: int = 0
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: CapcliError | None = None
    written: str | None = None

    @property
    def missing(self) -> int:
        """Images without a file."""
        return self._count(MISSING)

    @property
    def empty_captions(self) -> int:
        return self._count(EMPTY)

    @property
    def without_captions(self) -> int:
        """Images that the annotations list without a caption."""
        return self._count(WITHOUT)

    @property
    def unread(self) -> int:
        """Rows that cannot be read."""
        return self._count(UNREAD)

    @property
    def broken(self) -> int:
        """Images that cannot be decoded."""
        return len(self.failures) - sum(map(self._count, (MISSING, EMPTY, WITHOUT, UNREAD)))

    def _count(self, error: str) -> int:
        return Counter(failure.error for failure in self.failures)[error]

    def add(self, name: str, error: str, message: str) -> None:
        self.failures.append(Failure(name, error, message))

    def count(self, images: Iterable[Annotated], sign: int = 1) -> None:
        """Adds the images and their captions to the counts; `sign` -1 subtracts them."""
        for image in images:
            self.images += sign
            self.captions += sign * len(image.captions)

    def write(self, path: str) -> None:
        """Writes the failures as JSON lines, as `capcli caption` does; without failures, removes an earlier file.

        Raises CapcliError where the file cannot be written.
        """
        try:
            if self.failures:
                atomic.replace(path, map(failure_line, self.failures))
                self.written = path
            elif os.path.exists(path):
                os.remove(path)
        except OSError as error:
            raise CapcliError(f"cannot write {printable(path)}: {error.strerror or error}") from None

    def line(self) -> str:
        """The counts, what was left out, and the file that lists it, in one line."""
        found = f"{counted(self.images, 'image')}, {counted(self.captions, 'caption')}"
        left_out = ", ".join(self._left_out())
        listed = f" ({printable(as_text(self.written))})" if self.written and left_out else ""
        return found + (f"; left out: {left_out}{listed}" if left_out else "")

    def _left_out(self) -> Iterator[str]:
        for number, kind in ((self.missing, "missing"), (self.broken, "broken")):
            if number:
                yield f"{number:,} {kind}"
        if self.empty_captions:
            yield counted(self.empty_captions, "empty caption")
        if self.without_captions:
            yield f"{counted(self.without_captions, 'image')} without a caption"
        if self.unread:
            yield f"{counted(self.unread, 'row')} that cannot be read"
