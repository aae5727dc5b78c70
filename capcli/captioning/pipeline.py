"""Read this first: `capcli caption` from its options to the exit code.

    source -> decoder processes -> decode loop -> sink
    Entry     Loaded               Caption        rows

Everything is lazy: the source is read as the decoder processes have room, and those decode as the batch has room. An
image that cannot be captioned is a `Failure` from there on; only an error that stops every image is raised.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from capcli import console, pixels
from capcli.annotations.tags import MetadataTags
from capcli.captioning.captioner import Captioner
from capcli.captioning.plan import (
    choose_shapes,
    configured_sequences,
    decoder_processes,
    earlier_naming,
    load_captioner,
    new_run_file,
    search_settings,
    settle_gpu_decode,
)
from capcli.decoding.activity import Activity
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.errors import UsageError
from capcli.interrupts import Interrupts, announced
from capcli.loading import Loading, load
from capcli.loading.gpu_jpeg import GpuJpegDecoder, GpuLoading
from capcli.models.encoder_text import tag_ids
from capcli.options import CaptionOptions
from capcli.progress import Progress, Report, duration, is_shown, say, warn
from capcli.records import Caption, Entry, Failure
from capcli.sinks import ClosedPipeError, Sink, open_sink
from capcli.sources import Source, open_source
from capcli.sources.dataset_images import StoredDecode
from capcli.storage.run_file import RunFile
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
        captioner = load_captioner(options, earlier)
        settings = search_settings(options, captioner)
        options = settle_gpu_decode(options, captioner.model, earlier)
        run_file = new_run_file(options, source, captioner, settings, earlier)
        if earlier is not None:
            earlier.refuse_other_settings(run_file, options.sink.out)
        shapes, wanted = choose_shapes(options, captioner, settings, wanted, source, earlier)
        run = CaptionRun(options, captioner, settings, shapes, sink, report, run_file, source.is_gone)
        try:
            return run.caption_all(wanted, counter(source, options))
        except ClosedPipeError:
            return 0


@dataclass
class CaptionRun:
    """A configured run. Only `shapes` may change, when device memory runs out."""

    options: CaptionOptions
    captioner: Captioner
    settings: Settings
    shapes: Shapes
    sink: Sink
    report: Report
    run_file: RunFile
    is_gone: Callable[[str], bool] = lambda _: False

    def __post_init__(self) -> None:
        self.tags = MetadataTags(self.options.tags_field) if self.options.tags_field else None
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
        with (
            interrupts,
            progress,
            self.pixels(numbered(self.with_tags(wanted), entries)) as images,
        ):
            for _ in self.captioner.run(
                images,
                self.settings,
                self.shapes,
                deliver,
                ordered=self.options.order == "source",
                keep_prompt=self.options.keep_prompt,
                stop=interrupts.asked,
                on_shrink=self.shrink,
                activity=self.activity,
            ):
                progress.update()
        self.close(interrupted=interrupts.asked(), total=progress.total)
        return interrupts.exit_code or self.report.exit_code

    def with_tags(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, with the ids of their tags for an encoder that reads tags. The tags are read from metadata files."""
        tags, model = self.tags, self.captioner.model
        if tags is None:
            return entries
        ids = partial(tag_ids, model.tokenizer, count=model.tag_tokens)
        return (replace(entry, encoder_ids=ids([tags.of(entry.path)])[0]) for entry in entries)

    def pixels(self, entries: Iterable[Entry]) -> Loading | GpuLoading:
        """Start the decoder processes, and the GPU's JPEG decoder where it is used. Returns the loaded images."""
        options, model = self.options, self.captioner.model
        device = model.runtime.device
        start = partial(load, workers=decoder_processes(options, device), timeout=options.decode_timeout)
        arguments: dict[str, Any] = {"spec": model.spec, "max_pixels": options.max_pixels, "facts": self.sink.facts}
        decode = StoredDecode(partial(pixels.load, **arguments, fast=options.fast_decode))
        if not options.gpu_decode:
            return start(entries, decode)
        keep_jpeg = StoredDecode(partial(pixels.load_or_keep, **arguments))
        return GpuLoading(entries, GpuJpegDecoder.on(device, model.spec), keep_jpeg, decode, start)

    def shrink(self, shapes: Shapes) -> None:
        """Record that the run continues with fewer slots, so that a resumed run uses the same number."""
        if shapes.slots >= self.shapes.slots:  # another decode loop has shrunk already
            return
        self.shapes = shapes
        self.sink.write_run_file(self.current_run_file())
        where = f" in one of {shapes.loops} loops" if shapes.loops > 1 else ""
        warn(f"the device ran out of memory: continuing with a batch size of {shapes.slots}{where}")

    def current_run_file(self) -> RunFile:
        """The run file with the shapes of all tensors."""
        shapes, settings = self.shapes, self.settings
        return self.run_file.with_shapes(
            loops=shapes.loops, slots=shapes.slots, chunk=shapes.chunk, rows=settings.rows, pool=settings.entries
        )

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
        if self.tags and report.done and not self.tags.found:
            warn(f"no image has tags: there is no metadata with a field {self.options.tags_field} beside or above them")
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
            line += f" in {self.captioner.model.dtype}"
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
