"""All outputs of a run as one object: the captions file or standard output, sidecars, failures, and the run file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Self

from capcli.errors import CapcliError, ImageError, UsageError
from capcli.options import Format, SinkOptions
from capcli.records import Caption, Entry, Failure, Stamp
from capcli.sinks.image_record import ImageRecord, image_key, short_hash
from capcli.sinks.keys import Keys, key
from capcli.sinks.row_files import CaptionFile, FailureFile
from capcli.sinks.row_formats import RowFields
from capcli.sinks.sidecar import KIND, Claim, Sidecars
from capcli.sinks.stdout import Stdout
from capcli.storage import atomic
from capcli.storage.run_file import RunFile, stem_beside
from capcli.text import printable, raw_bytes

SEPARATOR = ", "  # before a caption that is appended to a text file


class Sink:
    """The outputs of a run. Call `begin` before the first `write`; `wanted` may be called at any time before `close`.

    `run_file` is what an earlier run left beside a captions file that this run continues, else None; `old_captions` and
    `old_failures` count the rows that it left. `changed` counts the images that are captioned again.
    """

    def __init__(self, options: SinkOptions, warn: Callable[[str], None]) -> None:
        _check(options)
        self._options = options
        self._warn = warn
        self._out = None if options.out == "-" else options.out
        self._stem = None if self._out is None else stem_beside(self._out)
        fields = RowFields(options.candidates, options.fields)
        self._file: CaptionFile | None = None
        self._record: ImageRecord | None = None
        self._stdout: Stdout | None = None
        if self._out is not None:
            self._file = CaptionFile(self._out, format_of(options), fields)
            self._record = ImageRecord(f"{self._stem}.images.bin")
        elif options.out == "-" or options.sidecar is None:
            self._stdout = Stdout(options.format, fields, warn)
        self._sidecars: Sidecars | None = None
        if options.sidecar is not None:
            separator = SEPARATOR if options.separator is None else options.separator
            existing = options.existing or "skip"
            self._sidecars = Sidecars(options.sidecar, options.sidecar_dir, existing, separator, warn)
        self.failures_path = options.failures or (f"{self._stem}.failures.jsonl" if self._stem else None)
        self._failures: FailureFile | None = None
        if self.failures_path is not None:
            self._failures = FailureFile(self.failures_path, named=options.failures is not None)
        self._failed_here = 0
        self._listed = Keys()
        self.run_file: RunFile | None = None
        self.old_captions = 0
        self.old_failures = 0
        self.changed = 0

    @property
    def captions(self) -> int:
        """Images with a row in the captions file."""
        return 0 if self._file is None else self._file.count

    @property
    def failures_on_record(self) -> int:
        """Images without a caption so far, including those of earlier runs where a file records them."""
        return self._failed_here if self._failures is None else len(self._failures)

    @property
    def facts(self) -> tuple[str, ...]:
        """The facts about each image that the outputs need."""
        return tuple(dict.fromkeys((*self._options.fields, *(() if self._record is None else ("sha256",)))))

    def open(self) -> None:
        """Lock and read what earlier runs wrote. Nothing on disk changes."""
        overwrite = self._options.overwrite
        captioned = Keys()
        if self._file is not None:
            self._file.open(overwrite=overwrite)
            captioned = self._file.keys
        if self._failures is not None:
            self._failures.open(captioned, overwrite=overwrite)
            self.old_failures = len(self._failures)
        self.old_captions = len(captioned)
        if self._out is not None:
            found = RunFile.beside(self._out, overwrite=overwrite)
            if captioned and found is None:
                raise UsageError(
                    f"{printable(self._out)} has rows, but the run file {printable(self._run_file_path)}, which gives "
                    "the settings of these rows, is missing: choose another --out, or start from scratch with "
                    "--overwrite"
                )
            self.run_file = found if self.old_captions or self.old_failures else None
            if self._record is not None and self._options.refresh:
                self._record.load(self._out)
        self._forget_listed_folders()

    def begin(self, run_file: RunFile) -> None:
        """Prepare the outputs for rows: cut off torn rows, or start from scratch, and write the run file.

        After a kill at any point the next run can continue: there are rows only after their run file was written, and
        a run file is replaced only after the rows and failures of its run were removed.
        """
        overwrite = self._options.overwrite
        if self._failures is not None:
            self._report_torn(self.failures_path, self._failures.begin(overwrite=overwrite))
        if self._file is not None and self._out is not None:
            if stem_beside(self._out) != self._stem:
                raise CapcliError(f"another run has begun beside {printable(self._out)}: run the same command again")
            torn = self._file.begin(overwrite=overwrite)
            self._report_torn(self._out, 0 if overwrite else torn)
            self.write_run_file(run_file)
            if self._record is not None:
                self._record.begin(self._out, overwrite=overwrite)
            self._file.start()
        for path in filter(None, (self._out, self.failures_path)):
            atomic.remove_abandoned(os.path.dirname(path))
        if self._sidecars is not None:
            self._sidecars.begin()
        if self._stdout is not None:
            self._stdout.start()

    def wanted(self, entry: Entry) -> Entry | None:
        """The entry if it is still to be captioned, with the state of its file, and with its failure if it has failed already.

        Call it once for each entry of the source, in order. None for an image that has a caption or has failed, whose sidecar
        is to be left as it is, or whose name was listed before. A run with rows on standard output alone does not track
        names: it wants every image.
        """
        if not self._wants(entry):
            return None
        stamp = None if self._record is None or entry.failure else _stamp(entry.path)
        failure = entry.failure or self._known_failure(entry)
        return entry if failure is None and stamp is None else replace(entry, failure=failure, stamp=stamp)

    def write(self, entry: Entry, result: Caption | Failure) -> Caption | Failure:
        """Write the result of an image that was wanted. When this returns, the operating system has the data.

        Returns what was recorded: a Failure in place of a caption that cannot be written.
        """
        if isinstance(result, Caption):
            try:
                self._write_caption(entry, result)
                return result
            except ImageError as error:
                result = Failure(result.name, error.kind, str(error))
        self._write_failure(entry, result)
        return result

    def prune(self, is_gone: Callable[[str], bool]) -> int:
        """Drop the rows and failures of images that are gone. Returns their number."""

        def gone(name: bytes) -> bool:
            return is_gone(os.fsdecode(name))

        rows = set(self._file.gone(gone)) if self._file is not None else set()
        failed = set(self._failures.gone(gone)) if self._failures is not None else set()
        for item in rows:
            if self._file is not None:
                self._file.drop(item)
        for item in failed:
            if self._failures is not None:
                self._failures.captioned(item)
        return len(rows | failed)

    def settle(self) -> None:
        """Put the new rows of changed images in the place of the old ones, and remove the rows that were dropped."""
        if self._file is None:
            return
        self._file.settle(superseded=self.run_file is not None and self.run_file.refreshing)
        if self._record is not None and (self._options.refresh or self._options.prune):
            self._record.rewrite(Keys(image_key(os.fsdecode(name)) for name in self._file.names()))

    def write_run_file(self, run_file: RunFile) -> None:
        """Write the run file beside the captions file; without a captions file there is none."""
        if self._out is not None and self._file is not None:
            self._file.check()
            run_file.write(self._run_file_path, self._out)

    def close(self) -> None:
        """Sync everything to disk, remove failures that have a caption now, and unlock and close the files."""
        with contextlib.ExitStack() as stack:
            if self._record is not None:
                stack.callback(self._record.close)
            if self._file is not None:
                stack.callback(self._file.close)
            if self._failures is not None:
                stack.callback(self._failures.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _run_file_path(self) -> str:
        return f"{self._stem}.run.json"

    def _forget_listed_folders(self) -> None:
        """Folders that could not be listed in an earlier run and can be now have not failed: their images are listed."""
        if self._failures is None:
            return
        root = self.run_file.folder if self.run_file is not None else None
        for name in self._failures.folders:
            with contextlib.suppress(OSError):
                os.scandir(os.path.join(root or "", os.fsdecode(name))).close()
                self._failures.captioned(key(name))

    def _wants(self, entry: Entry) -> bool:
        if self._stdout is not None and self._sidecars is None:
            return True
        item = key(raw_bytes(entry.name))
        captioned = self._file is not None and item in self._file.keys
        if captioned and self._sidecars is None and not self._options.refresh:
            return False  # without being added to `_listed`, which would take memory
        if item in self._listed:
            return False
        self._listed.add(item)
        claim = self._claim(entry)
        if captioned:
            return self._has_changed(entry)
        if self._failures is not None and self._stdout is None and item in self._failures:
            return self._options.retry_failed or self._has_changed(entry)
        if self._sidecars is None or not self._sidecars_only:
            return True
        return claim is Claim.TAKEN or (claim is Claim.OWN and not self._sidecars.keeps(entry))

    @property
    def _sidecars_only(self) -> bool:
        return self._file is None and self._stdout is None

    def _claim(self, entry: Entry) -> Claim | None:
        if self._sidecars is None or entry.failure is not None:
            return None
        claim = self._sidecars.claim(entry)
        if claim is Claim.TAKEN and not self._sidecars_only:
            self._sidecars.report_clash(entry)
        return claim

    def _has_changed(self, entry: Entry) -> bool:
        if self._record is None or not self._options.refresh or entry.failure is not None:
            return False
        stamp = _stamp(entry.path)
        changed = stamp is not None and self._record.changed(entry.name, entry.path, stamp)
        self.changed += changed
        return changed

    def _known_failure(self, entry: Entry) -> Failure | None:
        """Why the sidecar of an image cannot be written; the image need not be captioned then."""
        if self._sidecars is None:
            return None
        problem = self._sidecars.problem(entry, clashes=self._sidecars_only)
        return None if problem is None else Failure(entry.name, KIND, problem)

    def _write_caption(self, entry: Entry, caption: Caption) -> None:
        """Raises ImageError where the caption cannot be written, before any part of it is."""
        item = key(raw_bytes(caption.name))
        line = b"" if self._file is None else self._file.line(caption)
        # The sidecar comes first: an image has a row only if its sidecar is written. A kill between the two leaves a sidecar
        # without a row, and the next run captions the image again.
        if self._sidecars is not None:
            self._sidecars.write(entry, [candidate.text for candidate in caption.candidates])
        if self._file is not None:
            self._file.append(item, line)
        if self._stdout is not None:
            self._stdout.write(caption)
        if self._record is not None and entry.stamp is not None:
            found = caption.facts.get("sha256")
            self._record.add(entry.name, replace(entry.stamp, hash=short_hash(str(found)) if found else 0))
        if self._failures is not None:
            self._failures.captioned(item)

    def _write_failure(self, entry: Entry, failure: Failure) -> None:
        item = key(raw_bytes(failure.name))
        captioned = self._file is not None and item in self._file.keys
        if self._failures is not None:
            self._failures.write(failure)
        else:
            self._failed_here += 1
            self._warn(f"{printable(failure.name)}: {printable(failure.message)}")
        if captioned and self._file is not None:  # an image that has changed; after a kill it is tried again
            self._file.drop(item)
        elif self._record is not None and entry.stamp is not None:
            self._record.add(entry.name, entry.stamp)

    def _report_torn(self, path: str | None, size: int) -> None:
        if size and path is not None:
            self._warn(f"{printable(path)}: cut off {size} bytes of a row that an earlier run did not complete")


def _stamp(path: str) -> Stamp | None:
    """The state of a file; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return Stamp(status.st_size, status.st_mtime_ns)


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


def _check(options: SinkOptions) -> None:
    """Raises UsageError for options that contradict each other or need a file that the run does not have."""
    _check_sidecars(options)
    if options.out is not None and options.out != "-":
        folder, stem = os.path.split(stem_beside(options.out))
        beside = [f"{stem}.run.json", f"{stem}.images.bin", *([] if options.failures else [f"{stem}.failures.jsonl"])]
        paths = [os.path.realpath(path) for path in (options.out, options.failures) if path]
        paths += [os.path.join(os.path.realpath(folder), name) for name in beside]  # where links are not followed
        if len(set(paths)) < len(paths):
            raise UsageError("--out, --failures, the run file and the record of images need different names")
        if options.refresh and options.overwrite:
            raise UsageError("--refresh continues --out, and --overwrite starts it from scratch: give one of them")
        return
    for given, flag in ((options.refresh, "--refresh"), (options.prune, "--prune")):
        if given:
            raise UsageError(
                f"{flag} compares the images with the captions of earlier runs: name their file with --out"
            )
    # Without --out a file of failures can be started from scratch, and a run that only writes sidecars can read it.
    if options.overwrite and options.failures is None:
        raise UsageError("--overwrite starts a file from scratch: name it with --out")
    if options.retry_failed and (options.failures is None or options.out == "-" or options.sidecar is None):
        raise UsageError("--retry-failed needs the list of failures of an earlier run: name its file with --out")


def _check_sidecars(options: SinkOptions) -> None:
    for given, flag in (
        (options.sidecar_dir, "--sidecar-dir"),
        (options.existing, "--existing"),
        (options.separator, "--separator"),
    ):
        if given is not None and options.sidecar is None:
            raise UsageError(f"{flag} has no effect without --sidecar")
    if options.separator is not None and options.existing != "append":
        raise UsageError("--separator has no effect without --existing append")
    if options.refresh and options.sidecar is not None and options.existing in (None, "skip"):
        raise UsageError(
            "--refresh with --sidecar would leave the old caption in the text files: give --existing overwrite or append"
        )
