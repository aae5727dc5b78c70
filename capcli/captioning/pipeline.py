"""Read this first: `capcli caption` from its options to the exit code.

    source -> decoder processes -> backend -> sink
    Entry     Loaded               Caption    rows

Everything is lazy: the source is read as the decoder processes have room, and those decode as the batch has room. An
image that cannot be captioned is a `Failure` from there on; only an error that stops every image is raised.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy
import PIL

from capcli import __version__, console
from capcli.captioning.backends import open_backend
from capcli.captioning.backends.backend import Backend
from capcli.decoding.activity import Activity
from capcli.errors import UnfinishedError, UsageError
from capcli.interrupts import Interrupts, announced
from capcli.models.model_files import configured_sequences
from capcli.options import CaptionOptions
from capcli.progress import Progress, Report, duration, is_shown, say, warn
from capcli.records import Caption, Entry, Failure
from capcli.sinks import ClosedPipeError, Sink, open_sink
from capcli.sources import Naming, Source, open_source
from capcli.storage.run_file import ALL_RELATIVE, RunFile
from capcli.text import counted, printable


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
        refuse_sidecars_beside_rows(options, source)
        if options.sink.prune and not source.folders:
            raise UsageError("--prune drops the rows of images that are gone from a folder: no SOURCE is one")
        report = Report()
        wanted: Iterator[Entry] = islice(wanted_entries(source, sink, report), options.limit)
        if options.dry_run:
            return list_only(wanted, report)
        backend = open_backend(options, earlier)
        run_file = new_run_file(options, source, backend, earlier)
        if earlier is not None:
            earlier.refuse_other_settings(run_file, options.sink.out)
        wanted = backend.plan(wanted, source)
        run = CaptionRun(options, backend, sink, report, run_file, source.is_gone)
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
    is_gone: Callable[[str], bool] = lambda _: False

    def __post_init__(self) -> None:
        self.activity = Activity()

    def caption_all(self, wanted: Iterable[Entry], total: Callable[[], int] | None) -> int:
        """Caption the wanted entries. Returns the exit code. After a signal, images in the batch are finished first.

        `total` counts the images of the source, for the progress bar.
        """
        entries: dict[int, Entry] = {}  # those without a result yet, by their index
        self.sink.begin(self.current_run_file())
        self.report.began = time.monotonic()

        def deliver(index: int, result: Caption | Failure) -> None:
            self.report.add(self.sink.write(entries.pop(index), result))
            progress.update()

        progress = Progress(self.report, shown=self.shows_progress, total=total, work=self.activity)
        interrupts = Interrupts(
            quiet=self.options.quiet,
            message=lambda: announced(work_in_progress(self.activity)),
            at_once=partial(self.exit_at_once, progress),
        )
        try:
            with (
                interrupts,
                progress,
                self.backend.load(numbered(self.backend.prepared(wanted), entries), self.sink.facts) as images,
            ):
                for _ in self.backend.caption(
                    images, deliver, stop=interrupts.asked, changed=self.update_run_file, activity=self.activity
                ):
                    progress.update()
        except UnfinishedError:
            if self.report.done:
                self.close(interrupted=True, total=progress.total)
            else:
                self.update_run_file()
            raise
        self.close(interrupted=interrupts.asked(), total=progress.total)
        return interrupts.exit_code or self.report.exit_code

    def current_run_file(self) -> RunFile:
        """The run file with the backend's facts as they are now."""
        return self.run_file.with_facts(self.backend.facts())

    def update_run_file(self) -> None:
        self.sink.write_run_file(self.current_run_file())

    def exit_at_once(self, progress: Progress, code: int) -> None:
        """End the process in a signal handler. Rows need no clean-up, and decoder processes end with this one.

        An exception would end it only after the decode loops' current chunk.
        """
        if not self.options.quiet:
            console.write_last(self.interrupted_line(progress.total))
        os._exit(code)

    def close(self, *, interrupted: bool, total: int | None) -> None:
        """Write the final run file and print the closing lines. `total` is the number of images of the source, if known."""
        report, sink = self.report, self.sink
        pruned = 0 if interrupted else self.prune()
        sink.settle()
        report.on_record = sink.failures_on_record - report.failed
        state = "interrupted" if interrupted else "finished"
        counts = {"captions": sink.captions, "failures": sink.failures_on_record}
        last_run = {"captioned": report.captioned, "failed": report.failed, "skipped": report.skipped}
        seconds = round(report.seconds, 3)
        sink.write_run_file(self.current_run_file().ended(state, counts, {**last_run, "seconds": seconds}))
        for note in self.backend.notes() if report.done else ():
            warn(note)
        if self.options.quiet:
            return
        if not interrupted and not report.seen:
            left = ": --limit selects none" if self.options.limit == 0 else ""
            warn(f"there is no image in {self.run_file.source}{left}")
        say(self.closing_line(pruned))
        if interrupted:
            say(self.interrupted_line(total))

    def interrupted_line(self, total: int | None) -> str:
        """How far the run came, and how to go on."""
        report, out = self.report, self.options.sink
        done = report.captioned + max(0, report.skipped - self.sink.old_failures)
        of = "" if total is None else f" of {total}"
        goes_on = "; the same command goes on" if out.out not in (None, "-") or out.sidecar else ""
        return f"interrupted: {done}{of} captioned{goes_on}"

    def prune(self) -> int:
        """With --prune, drop the rows and failures of images that are gone. Returns their number."""
        if not self.options.sink.prune:
            return 0
        if not self.report.seen:  # a disk that is not mounted is an empty folder
            warn(f"--prune has no effect: there is no image in {self.run_file.source}")
            return 0
        return self.sink.prune(self.is_gone)

    def closing_line(self, pruned: int) -> str:
        line = self.report.line()
        if self.options.sink.refresh:
            line += f"; {counted(self.sink.changed, 'changed image')} tried again"
        if self.options.sink.prune:
            line += f"; {counted(pruned, 'row')} of images that are gone dropped"
        if self.report.done:
            line += f" {self.backend.label}"
        if self.report.failed and self.sink.failures_path:
            line += f"; failures are listed in {printable(self.sink.failures_path)}"
        return line

    @property
    def shows_progress(self) -> bool:
        """False where rows are printed on a terminal that cannot show a status line below them: they show the progress."""
        out = self.options.sink.out
        rows_shown = sys.stdout.isatty() and (out == "-" or (out is None and self.options.sink.sidecar is None))
        shown = is_shown(quiet=self.options.quiet, reads_stdin=self.options.source.reads_stdin)
        return shown and (console.can_draw() or not rows_shown)


def work_in_progress(activity: Activity) -> str:
    """What is finished after a signal, and about how long that takes."""
    count, seconds = activity.under_way, activity.seconds_left
    if not count:
        return "the work in progress"
    what = "the image under way" if count == 1 else f"the {count} images under way"
    return what if seconds is None else f"{what}, which takes about {duration(max(1.0, seconds))}"


def refuse_sidecars_beside_rows(options: CaptionOptions, source: Source) -> None:
    """Raises UsageError for text files beside images that are rows of a prepared copy."""
    if source.stored and options.sink.sidecar is not None and options.sink.sidecar_dir is None:
        raise UsageError("--sidecar: a prepared copy has no image files to write beside: give --sidecar-dir")


def wanted_entries(source: Source, sink: Sink, report: Report) -> Iterator[Entry]:
    """The entries that are still to be captioned; the others are counted as skipped."""
    for entry in source:
        wanted = sink.wanted(entry)
        if wanted is not None:
            yield wanted
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
        if entry.failure is not None:
            report.add(entry.failure)
            warn(f"{printable(entry.name)}: {entry.failure.message}")
            continue
        count += 1
        with console.hidden(console.SILENCE):
            print(printable(entry.name))
    say(f"{count} would be captioned, {report.skipped} skipped")
    return report.exit_code


def counter(source: Source, options: CaptionOptions) -> Callable[[], int] | None:
    """A function that counts the source; None for a source that can be read only once, and with --limit."""
    if source.streaming or options.limit is not None:
        return None
    return lambda: sum(1 for _ in source)


def earlier_naming(earlier: RunFile | None) -> Naming | None:
    """How the earlier run named its images."""
    return None if earlier is None else Naming(earlier.folder, earlier.all_relative)


def names_rule(source: Source, earlier: RunFile | None) -> Mapping[str, str]:
    """The run file's entry for names that are all relative to its folder; without it they are as earlier versions gave them."""
    relative = source.root is not None if earlier is None else earlier.all_relative
    return {"names": ALL_RELATIVE} if relative else {}


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
            **names_rule(source, earlier),
            **({"refresh": True} if options.sink.refresh or (earlier is not None and earlier.refreshing) else {}),
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
