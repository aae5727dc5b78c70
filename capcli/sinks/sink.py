"""The outputs of a run behind one face."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Self

from capcli.options import SinkOptions
from capcli.records import Caption, Entry, Failure
from capcli.sinks.captions import CaptionFile
from capcli.sinks.failures import FailureFile
from capcli.sinks.formats import RowFields
from capcli.sinks.keys import Keys, key
from capcli.sinks.paths import Paths, format_of
from capcli.sinks.sidecar import Sidecars
from capcli.sinks.stdout import Console
from capcli.text import printable, raw_bytes


class Sink:
    """The outputs of a run. `begin` comes before the first `write`; `wants` may be asked at any time before `close`.

    `receipt` is what an earlier run left beside a captions file that is gone on with, else None; `old_captions` and
    `old_failures` are how many it left on record.
    """

    def __init__(self, options: SinkOptions, warn: Callable[[str], None]) -> None:
        self._options = options
        self._warn = warn
        self._paths = Paths.of(options)
        columns = RowFields(options.candidates, options.fields)
        self._file: CaptionFile | None = None
        self._console: Console | None = None
        if self._paths.out is not None:
            self._file = CaptionFile(self._paths.out, format_of(options), columns)
        elif options.out == "-" or options.sidecar is None:
            self._console = Console(options.format, columns, warn)
        self._sidecars: Sidecars | None = None
        if options.sidecar is not None:
            self._sidecars = Sidecars(options.sidecar, options.sidecar_dir, options.existing, warn)
        self._failures = None if self._paths.failures is None else FailureFile(self._paths.failures)
        self._failed_here = 0
        self._listed = Keys()
        self._last: tuple[int, list[str]] | None = None
        self._missed: tuple[Entry, list[str]] | None = None
        self._begun = False
        self.receipt: dict[str, Any] | None = None
        self.old_captions = 0
        self.old_failures = 0

    @property
    def failures_path(self) -> str | None:
        """The file that failures are written to."""
        return self._paths.failures

    @property
    def failures_on_record(self) -> int:
        """Images without caption so far, those of earlier runs included where a file records them."""
        return self._failed_here if self._failures is None else len(self._failures)

    def open(self) -> None:
        """Lock and read what earlier runs left. Nothing on disk changes."""
        overwrite = self._options.overwrite
        captioned = Keys()
        if self._file is not None:
            self._file.open(overwrite=overwrite)
            captioned = self._file.keys
            self._last = self._file.last() if self._sidecars and captioned else None
        if self._failures is not None:
            self._failures.open(captioned, overwrite=overwrite)
            self.old_failures = len(self._failures)
        self.old_captions = len(captioned)
        if self._paths.receipt is not None:
            left = self._paths.read_receipt(overwrite=overwrite, rows=bool(captioned))
            self.receipt = left if self.old_captions or self.old_failures else None

    def begin(self, data: Mapping[str, Any]) -> None:
        """Make the outputs ready for rows: mend, or start anew, and write the receipt.

        The order makes every state that a kill can leave one to go on from: rows exist only after their receipt, and a
        receipt is replaced only after the rows and failures it spoke of are gone.
        """
        overwrite = self._options.overwrite
        if self._failures is not None:
            self._tell(self._paths.failures, self._failures.begin(overwrite=overwrite))
        if self._file is not None:
            torn = self._file.begin(overwrite=overwrite)
            self._tell(self._paths.out, 0 if overwrite else torn)
            self.write_receipt(data)
            self._file.start()
        if self._console is not None:
            self._console.start()
        self._begun = True
        self._write_missed()

    def wants(self, entry: Entry) -> bool:
        """Whether the image is still to be captioned; to be asked once for every entry listed, in order.

        False where it is captioned or has failed already, where its sidecar is to be left, and for a name listed before
        (but standard output alone keeps no account of names).
        """
        if self._console is not None and self._sidecars is None:
            return True
        item = key(raw_bytes(entry.name))
        captioned = self._file is not None and item in self._file.keys
        if captioned and self._sidecars is None:  # as it will be when it is listed again: no account need be kept
            return False
        if item in self._listed:
            return False
        self._listed.add(item)
        if not self._wants_sidecar(entry, item) or captioned:
            return False
        known = self._failures is not None and self._console is None and item in self._failures
        return not known or self._options.retry_failed

    def write(self, entry: Entry, result: Caption | Failure) -> None:
        """Record what became of an image that was wanted; it is with the system when this returns."""
        if isinstance(result, Failure):
            self._write_failure(result)
            return
        # The row goes first: should the run end before the sidecar is there, the next one makes it from the last row.
        if self._file is not None:
            self._file.write(result)
        if self._console is not None:
            self._console.write(result)
        if self._sidecars is not None:
            self._sidecars.write(entry, [candidate.text for candidate in result.candidates])
        if self._failures is not None:
            self._failures.mended(key(raw_bytes(result.name)))

    def write_receipt(self, data: Mapping[str, Any]) -> None:
        """Replace the receipt, where there is one."""
        self._paths.write_receipt(data)

    def close(self) -> None:
        """Make everything safe on disk, take mended failures off the record, and let go of the files."""
        with contextlib.ExitStack() as stack:
            if self._file is not None:
                stack.callback(self._file.close)
            if self._failures is not None:
                stack.callback(self._failures.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wants_sidecar(self, entry: Entry, item: int) -> bool:
        """Whether the sidecar, if any, leaves a reason to caption the image."""
        if self._sidecars is None:
            return True
        claimed = self._sidecars.claim(entry)
        if claimed and self._last is not None and self._last[0] == item:
            self._missed = (entry, self._last[1])
            self._write_missed()
        alone = self._file is None and self._console is None
        return claimed or not (alone or self._sidecars.existing == "skip")

    def _write_missed(self) -> None:
        """Write the one sidecar that an earlier run may not have come to."""
        if self._begun and self._missed is not None and self._sidecars is not None:
            self._sidecars.write(*self._missed)
            self._missed = None

    def _write_failure(self, failure: Failure) -> None:
        if self._failures is not None:
            self._failures.write(failure)
            return
        self._failed_here += 1
        self._warn(f"{printable(failure.name)}: {printable(failure.message)}")

    def _tell(self, path: str | None, torn: int) -> None:
        if torn and path is not None:
            self._warn(f"{printable(path)}: cut off {torn} bytes of a row that an earlier run could not finish")
