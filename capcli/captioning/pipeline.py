"""Read this first: `capcli caption` from its options to the exit code.

    source -> decoder processes -> backend -> sink
    Entry     Loaded               Caption    rows

Everything is lazy: the source is read as the decoder processes have room, and those decode as the batch has room. An
image that cannot be captioned is a `Failure` from there on; only an error that stops every image is raised.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy
import PIL

from capcli import __version__
from capcli.captioning.backends import open_backend
from capcli.captioning.backends.base import Backend
from capcli.errors import UnfinishedError
from capcli.interrupts import Interrupts
from capcli.models.model_files import configured_sequences
from capcli.options import CaptionOptions
from capcli.progress import Progress, Report, say, warn
from capcli.records import Caption, Entry, Failure
from capcli.sinks import ClosedPipeError, Sink, open_sink
from capcli.sources import Naming, Source, open_source
from capcli.storage.run_file import RunFile
from capcli.text import printable


def run(options: CaptionOptions) -> int:
    """Caption every image of the source that has no caption yet. Returns the exit code.

    Raises UsageError for a wrong command (before any weights are read, except where only the loaded model can tell, as for a
    prompt that is too long), and CapcliError when the run cannot continue.
    """
    several = options.generation.num_return_sequences is None and configured_sequences(options.model) > 1
    options = replace(options, sink=replace(options.sink, candidates=options.sink.candidates or several))
    with open_sink(options.sink, warn) as sink:
        earlier = sink.run_file  # of the run that this one continues
        source = open_source(options.source, warn, earlier_naming(earlier))
        report = Report()
        wanted: Iterator[Entry] = islice(wanted_entries(source, sink, report), options.limit)
        if options.dry_run:
            return list_only(wanted, report)
        backend = open_backend(options, earlier)
        run_file = new_run_file(options, source, backend, earlier)
        if earlier is not None:
            earlier.refuse_other_settings(run_file, options.sink.out)
        wanted = backend.plan(wanted, source)
        run = CaptionRun(options, backend, sink, report, run_file)
        try:
            return run.caption_all(wanted, counter(source, options))
        except ClosedPipeError:
            return 0


@dataclass
class CaptionRun:
    """A run that is set up."""

    options: CaptionOptions
    backend: Backend
    sink: Sink
    report: Report
    run_file: RunFile

    def caption_all(self, wanted: Iterable[Entry], total: Callable[[], int] | None) -> int:
        """Caption the wanted entries. Returns the exit code. After a signal, images in the batch are finished first.

        `total` counts the images of the source, for the progress bar.
        """
        entries: dict[int, Entry] = {}  # those without a result yet, by their index
        self.sink.begin(self.current_run_file())
        self.report.began = time.monotonic()

        def deliver(index: int, result: Caption | Failure) -> None:
            self.sink.write(entries.pop(index), result)
            self.report.add(result)
            progress.update()

        try:
            with (
                Interrupts(quiet=self.options.quiet) as interrupts,
                Progress(self.report, shown=self.shows_progress, total=total) as progress,
                self.backend.load(numbered(self.backend.prepared(wanted), entries)) as images,
            ):
                for _ in self.backend.caption(images, deliver, stop=interrupts.asked, changed=self.update_run_file):
                    progress.update()
        except UnfinishedError:
            if self.report.done:
                self.close(interrupted=True)
            raise
        self.close(interrupted=interrupts.asked())
        return interrupts.exit_code or self.report.exit_code

    def current_run_file(self) -> RunFile:
        """The run file with the backend's facts as they are now."""
        return self.run_file.with_facts(self.backend.facts())

    def update_run_file(self) -> None:
        self.sink.write_run_file(self.current_run_file())

    def close(self, *, interrupted: bool) -> None:
        """Write the final run file and print the closing line."""
        report, sink = self.report, self.sink
        report.on_record = sink.failures_on_record - report.failed
        state = "interrupted" if interrupted else "finished"
        counts = {"captions": sink.old_captions + report.captioned, "failures": sink.failures_on_record}
        last_run = {"captioned": report.captioned, "failed": report.failed, "skipped": report.skipped}
        seconds = round(report.seconds, 3)
        sink.write_run_file(self.current_run_file().ended(state, counts, {**last_run, "seconds": seconds}))
        for note in self.backend.notes() if report.done else ():
            warn(note)
        if self.options.quiet:
            return
        if not interrupted and not report.seen:
            source = self.options.source
            selected = source.include or source.exclude or self.options.limit == 0
            left = ": --include, --exclude and --limit select none" if selected else ""
            warn(f"there is no image in {self.run_file.source}{left}")
        say(self.closing_line())

    def closing_line(self) -> str:
        line = self.report.line()
        if self.report.done:
            line += f" {self.backend.label}"
        if self.report.failed and self.sink.failures_path:
            line += f"; failures are listed in {printable(self.sink.failures_path)}"
        return line

    @property
    def shows_progress(self) -> bool:
        """False where rows are printed on a terminal: they show the progress, and a bar would overlap them."""
        out = self.options.sink.out
        rows_shown = sys.stdout.isatty() and (out == "-" or (out is None and self.options.sink.sidecar is None))
        return not (self.options.quiet or rows_shown)


def wanted_entries(source: Source, sink: Sink, report: Report) -> Iterator[Entry]:
    """The entries that are still to be captioned; the others are counted as skipped."""
    for entry in source:
        if sink.wants(entry):
            yield entry
        else:
            report.skipped += 1


def numbered(entries: Iterable[Entry], by_index: dict[int, Entry]) -> Iterator[Entry]:
    """The entries, each also put into `by_index`: results come with the index of their entry."""
    for index, entry in enumerate(entries):
        by_index[index] = entry
        yield entry


def list_only(wanted: Iterable[Entry], report: Report) -> int:
    """A dry run: print the names of the images that would be captioned."""
    count = 0
    for entry in wanted:
        count += 1
        print(printable(entry.name))
    say(f"{count} would be captioned, {report.skipped} skipped")
    return 0


def counter(source: Source, options: CaptionOptions) -> Callable[[], int] | None:
    """A function that counts the source; None for a source that can be read only once, and with --limit."""
    if source.streaming or options.limit is not None:
        return None
    return lambda: sum(1 for _ in source)


def earlier_naming(earlier: RunFile | None) -> Naming | None:
    """How the earlier run named its images."""
    return None if earlier is None else Naming(earlier.folder)


def new_run_file(options: CaptionOptions, source: Source, backend: Backend, earlier: RunFile | None) -> RunFile:
    """The run file before the first image.

    Captions depend on what is under `settings`: a later run continues only where all of it is the same.
    """
    facts = dict(backend.facts())
    versions = {"python": platform.python_version(), "pillow": PIL.__version__, "numpy": numpy.__version__}
    return RunFile(
        {
            "capcli": __version__,
            "state": "running",
            "source": source.describe(),
            "folder": source.root if earlier is None else earlier.folder,
            "settings": {
                **backend.settings(),
                "fields": list(options.sink.fields),
                "keep_prompt": options.keep_prompt,
                "sidecar": options.sink.sidecar,
                "sidecar_dir": options.sink.sidecar_dir,
            },
            "images": {
                "max_pixels": options.max_pixels,
                "decode_timeout": options.decode_timeout,
                "order": options.order,
            },
            "batch_size": options.batch_size,
            **facts,
            "versions": {**versions, **facts.get("versions", {})},
        }
    )
