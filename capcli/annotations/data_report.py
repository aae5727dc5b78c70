"""What became of the data: how much there is, and what was left out, in a file for programs and a line for people."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from capcli.errors import CapcliError
from capcli.records import Annotated, Failure
from capcli.sinks.formats import failure_line
from capcli.storage import atomic
from capcli.text import as_text, counted, printable

# any other kind is a broken image
MISSING, EMPTY, WITHOUT, UNREAD = "missing", "empty-caption", "no-caption", "unreadable-row"


@dataclass
class DataReport:
    """Images and captions that are there to be used, and a failure for each one left out.

    A failure's `error` is `missing` (no such file), `empty-caption` (one for each), `no-caption` (the annotations name
    the image and say nothing of it), or why the image cannot be decoded. `notes` are lines for people on what else
    they should know, such as names in a list that the data lack. A row that cannot be read is an `unreadable-row`, under the
    name of its file; `fault` is the first one's error.
    """

    images: int = 0
    captions: int = 0
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fault: CapcliError | None = None
    written: str | None = None

    @property
    def missing(self) -> int:
        """Images whose file was not found."""
        return self._count(MISSING)

    @property
    def empty_captions(self) -> int:
        return self._count(EMPTY)

    @property
    def without_captions(self) -> int:
        """Images of which the annotations say nothing."""
        return self._count(WITHOUT)

    @property
    def unread(self) -> int:
        """Rows that cannot be read."""
        return self._count(UNREAD)

    @property
    def broken(self) -> int:
        """Images that are there and cannot be decoded."""
        return len(self.failures) - sum(map(self._count, (MISSING, EMPTY, WITHOUT, UNREAD)))

    def _count(self, error: str) -> int:
        return Counter(failure.error for failure in self.failures)[error]

    def add(self, name: str, error: str, message: str) -> None:
        self.failures.append(Failure(name, error, message))

    def count(self, images: Iterable[Annotated], sign: int = 1) -> None:
        """Counts images that are used or, with `sign` -1, no longer."""
        for image in images:
            self.images += sign
            self.captions += sign * len(image.captions)

    def write(self, path: str) -> None:
        """Writes the failures as JSON lines, as `capcli caption` does; without any, a file of an earlier run is removed.

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
        """One line for people: what there is, what was left out, and where that is listed."""
        there = f"{counted(self.images, 'image')}, {counted(self.captions, 'caption')}"
        left_out = ", ".join(self._left_out())
        listed = f" ({printable(as_text(self.written))})" if self.written and left_out else ""
        return there + (f"; left out: {left_out}{listed}" if left_out else "")

    def _left_out(self) -> Iterator[str]:
        for number, words in ((self.missing, "missing"), (self.broken, "broken")):
            if number:
                yield f"{number:,} {words}"
        if self.empty_captions:
            yield counted(self.empty_captions, "empty caption")
        if self.without_captions:
            yield f"{counted(self.without_captions, 'image')} without a caption"
        if self.unread:
            yield f"{counted(self.unread, 'row')} that cannot be read"
