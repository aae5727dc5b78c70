"""All outputs of a run as one object: the captions file or standard output, sidecars, failures, and the run file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Self

from capcli.errors import UsageError
from capcli.options import Format, SinkOptions
from capcli.records import Caption, Entry, Failure
from capcli.sinks.keys import Keys, key
from capcli.sinks.row_files import CaptionFile, FailureFile
from capcli.sinks.row_formats import RowFields
from capcli.sinks.sidecar import Sidecars
from capcli.sinks.stdout import Stdout
from capcli.storage.run_file import RunFile, path_beside
from capcli.text import printable, raw_bytes


class Sink:
    """The outputs of a run. Call `begin` before the first `write`; `wants` may be called at any time before `close`.

    `run_file` is what an earlier run left beside a captions file that this run continues, else None; `old_captions` and
    `old_failures` count the rows that it left.
    """

    def __init__(self, options: SinkOptions, warn: Callable[[str], None]) -> None:
        _check(options)
        self._options = options
        self._warn = warn
        self._out = None if options.out == "-" else options.out
        fields = RowFields(options.candidates, options.fields)
        self._file: CaptionFile | None = None
        self._stdout: Stdout | None = None
        if self._out is not None:
            self._file = CaptionFile(self._out, format_of(options), fields)
        elif options.out == "-" or options.sidecar is None:
            self._stdout = Stdout(options.format, fields, warn)
        self._sidecars: Sidecars | None = None
        if options.sidecar is not None:
            self._sidecars = Sidecars(options.sidecar, options.sidecar_dir, options.existing, warn)
        self.failures_path = _failures_path(options)
        self._failures = None if self.failures_path is None else FailureFile(self.failures_path)
        self._failed_here = 0
        self._listed = Keys()
        self._last: tuple[int, list[str]] | None = None
        self._missed: tuple[Entry, list[str]] | None = None
        self._begun = False
        self.run_file: RunFile | None = None
        self.old_captions = 0
        self.old_failures = 0

    @property
    def failures_on_record(self) -> int:
        """Images without a caption so far, including those of earlier runs where a file records them."""
        return self._failed_here if self._failures is None else len(self._failures)

    def open(self) -> None:
        """Lock and read what earlier runs wrote. Nothing on disk changes."""
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
        if self._out is not None:
            found = RunFile.beside(self._out, overwrite=overwrite)
            if captioned and found is None:
                raise UsageError(
                    f"{printable(self._out)} has rows, but the run file {printable(path_beside(self._out))}, which gives "
                    "the settings of these rows, is missing: choose another --out, or start from scratch with "
                    "--overwrite"
                )
            self.run_file = found if self.old_captions or self.old_failures else None

    def begin(self, run_file: RunFile) -> None:
        """Prepare the outputs for rows: cut off torn rows, or start from scratch, and write the run file.

        After a kill at any point the next run can continue: there are rows only after their run file was written, and
        a run file is replaced only after the rows and failures of its run were removed.
        """
        overwrite = self._options.overwrite
        if self._failures is not None:
            self._report_torn(self.failures_path, self._failures.begin(overwrite=overwrite))
        if self._file is not None:
            torn = self._file.begin(overwrite=overwrite)
            self._report_torn(self._out, 0 if overwrite else torn)
            self.write_run_file(run_file)
            self._file.start()
        if self._stdout is not None:
            self._stdout.start()
        self._begun = True
        self._write_missed()

    def wants(self, entry: Entry) -> bool:
        """Whether the image is still to be captioned. Call it once for each entry of the source, in order.

        False for an image that has a caption or has failed, whose sidecar is to be left as it is, or whose name was
        listed before. A run with rows on standard output alone does not track names: True for every image.
        """
        if self._stdout is not None and self._sidecars is None:
            return True
        item = key(raw_bytes(entry.name))
        captioned = self._file is not None and item in self._file.keys
        if captioned and self._sidecars is None:  # without being added to `_listed`, which would take memory
            return False
        if item in self._listed:
            return False
        self._listed.add(item)
        if not self._wants_sidecar(entry, item) or captioned:
            return False
        failed = self._failures is not None and self._stdout is None and item in self._failures
        return not failed or self._options.retry_failed

    def write(self, entry: Entry, result: Caption | Failure) -> None:
        """Write the result of an image that was wanted. When this returns, the operating system has the data."""
        if isinstance(result, Failure):
            self._write_failure(result)
            return
        # The row comes first: if the run is killed before the sidecar, the next run writes it from the last row.
        if self._file is not None:
            self._file.write(result)
        if self._stdout is not None:
            self._stdout.write(result)
        if self._sidecars is not None:
            self._sidecars.write(entry, [candidate.text for candidate in result.candidates])
        if self._failures is not None:
            self._failures.captioned(key(raw_bytes(result.name)))

    def write_run_file(self, run_file: RunFile) -> None:
        """Write the run file beside the captions file; without a captions file there is none."""
        if self._out is not None:
            run_file.write_beside(self._out)

    def close(self) -> None:
        """Sync everything to disk, remove failures that have a caption now, and unlock and close the files."""
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
        """Whether the image is to be captioned as far as its sidecar, if any, is concerned."""
        if self._sidecars is None:
            return True
        claimed = self._sidecars.claim(entry)
        if claimed and self._last is not None and self._last[0] == item:
            self._missed = (entry, self._last[1])
            self._write_missed()
        sidecars_only = self._file is None and self._stdout is None
        return claimed or not (sidecars_only or self._sidecars.existing == "skip")

    def _write_missed(self) -> None:
        """Write the sidecar of the last row: an earlier run may have been killed between the two."""
        if self._begun and self._missed is not None and self._sidecars is not None:
            self._sidecars.write(*self._missed)
            self._missed = None

    def _write_failure(self, failure: Failure) -> None:
        if self._failures is not None:
            self._failures.write(failure)
            return
        self._failed_here += 1
        self._warn(f"{printable(failure.name)}: {printable(failure.message)}")

    def _report_torn(self, path: str | None, size: int) -> None:
        if size and path is not None:
            self._warn(f"{printable(path)}: cut off {size} bytes of a row that an earlier run did not complete")


def format_of(options: SinkOptions) -> Format:
    """The format of the captions file. Raises UsageError where neither --format nor the suffix gives it."""
    if options.format is not None:
        return options.format
    suffix = os.path.splitext(options.out or "")[1].lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".csv":
        return "csv"
    raise UsageError(f"--out {printable(options.out or '')}: name it .jsonl or .csv, or give --format")


def _failures_path(options: SinkOptions) -> str | None:
    if options.out in (None, "-"):
        return options.failures
    return options.failures or f"{os.path.splitext(options.out)[0]}.failures.jsonl"


def _check(options: SinkOptions) -> None:
    """Raises UsageError for options that contradict each other or need a file that the run does not have."""
    if options.sidecar_dir is not None and options.sidecar is None:
        raise UsageError("--sidecar-dir has no effect without --sidecar")
    if options.out is not None and options.out != "-":
        paths = (options.out, path_beside(options.out), _failures_path(options))
        if len({os.path.realpath(path) for path in paths if path}) < 3:
            raise UsageError("--out, --failures and the run file need three different names")
        return
    # Without --out a file of failures can be started from scratch, and a run that only writes sidecars can read it.
    if options.overwrite and options.failures is None:
        raise UsageError("--overwrite starts a file from scratch: name it with --out")
    if options.retry_failed and (options.failures is None or options.out == "-" or options.sidecar is None):
        raise UsageError("--retry-failed needs the list of failures of an earlier run: name its file with --out")
