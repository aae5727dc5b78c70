"""Read this first: source -> pixels -> captions -> sinks, on one page."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from capcli import pixels
from capcli.annotations.tags import MetadataTags
from capcli.captioning.captioner import Captioner
from capcli.captioning.plan import (
    choose_shapes,
    decoder_processes,
    load_captioner,
    own_sequences,
    search_settings,
    settle_gpu_decode,
)
from capcli.captioning.provenance import earlier_naming, finished, make_run_record, refuse_other_settings, with_shapes
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.interrupts import Interrupts
from capcli.loading import Loading, load
from capcli.loading.gpu_jpeg import GpuJpegDecoder, GpuLoading
from capcli.models.encoder_text import tag_ids
from capcli.options import CaptionOptions
from capcli.progress import Progress, Report, say, warn
from capcli.records import Caption, Entry, Failure
from capcli.sinks import ClosedPipeError, Sink, open_sink
from capcli.sources import Source, open_source
from capcli.text import printable


def run(options: CaptionOptions) -> int:
    """Caption every image of the source that is not captioned yet; gives the exit code.

    Raises UsageError for a wrong command, before any model is loaded, and CapcliError when the run cannot go on.
    """
    several = options.generation.num_return_sequences is None and own_sequences(options.model) > 1
    options = replace(options, sink=replace(options.sink, candidates=options.sink.candidates or several))
    with open_sink(options.sink, warn) as sink:
        source = open_source(options.source, warn, earlier_naming(sink.receipt))
        report = Report()
        wanted: Iterator[Entry] = islice(wanted_entries(source, sink, report), options.limit)
        if options.dry_run:
            return list_only(wanted, report)
        captioner = load_captioner(options, sink.receipt)
        tags = MetadataTags(options.tags_field) if options.tags_field else None
        settings = search_settings(options, captioner)
        options = settle_gpu_decode(options, captioner.model, sink.receipt)
        receipt = make_run_record(options, source, captioner, settings, sink.receipt)
        refuse_other_settings(sink.receipt, receipt, options.sink.out)
        shapes, wanted = choose_shapes(options, captioner, settings, wanted, source, sink.receipt)
        run = CaptionRun(options, captioner, settings, shapes, sink, report, receipt, tags)
        try:
            return run.caption_all(wanted, counter(source, options))
        except ClosedPipeError:
            return 0


@dataclass
class CaptionRun:
    """A run whose every choice is made."""

    options: CaptionOptions
    captioner: Captioner
    settings: Settings
    shapes: Shapes
    sink: Sink
    report: Report
    receipt: dict[str, Any]
    tags: MetadataTags | None = None

    def caption_all(self, wanted: Iterable[Entry], total: Callable[[], int] | None) -> int:
        """source -> pixels -> captions -> sinks; the exit code. A signal ends it once what is under way is done."""
        listed: dict[int, Entry] = {}
        self.sink.begin(with_shapes(self.receipt, self.shapes, self.settings))
        self.report.began = time.monotonic()

        def deliver(index: int, result: Caption | Failure) -> None:
            self.sink.write(listed.pop(index), result)
            self.report.add(result)
            progress.update()

        with (
            Interrupts(quiet=self.options.quiet) as interrupts,
            Progress(self.report, shown=self.shows_progress, total=total) as progress,
            self.pixels(numbered(self.with_tags(wanted), listed)) as arrivals,
        ):
            for _ in self.captioner.run(
                arrivals,
                self.settings,
                self.shapes,
                deliver,
                ordered=self.options.order == "source",
                before=self.settings.prompt[1:] if self.options.keep_prompt else (),
                stop=interrupts.asked,
                shrunk=self.shrink,
            ):
                progress.update()
        self.close(cut_short=interrupts.asked())
        return interrupts.exit_code or self.report.exit_code

    def with_tags(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The entries, each with what the encoder reads beside it: its tags, of the metadata beside its file."""
        tags, model = self.tags, self.captioner.model
        if tags is None:
            return entries
        ids = partial(tag_ids, model.tokenizer, count=model.tag_tokens)
        return (replace(entry, encoder_ids=ids([tags.of(entry.path)])[0]) for entry in entries)

    def close(self, *, cut_short: bool) -> None:
        """The receipt and the closing line."""
        self.report.on_record = self.sink.failures_on_record - self.report.failed
        state = "interrupted" if cut_short else "finished"
        receipt = with_shapes(self.receipt, self.shapes, self.settings)
        self.sink.write_receipt(finished(receipt, self.report, self.sink, state))
        if self.tags and self.report.done and not self.tags.found:
            warn(f"no image has tags: looked for metadata with a field {self.options.tags_field} beside and above them")
        if not (self.options.quiet or cut_short or self.report.seen):
            source = self.options.source
            chosen = source.include or source.exclude or self.options.limit == 0
            left = " that --include, --exclude and --limit leave" if chosen else ""
            warn(f"there is no image in {self.receipt['source']}{left}")
        if not self.options.quiet:
            say(self.closing_line())

    def closing_line(self) -> str:
        line = self.report.line()
        if self.report.done:
            line += f" in {self.captioner.model.dtype}"
        if self.report.failed and self.sink.failures_path:
            line += f"; what failed is in {printable(self.sink.failures_path)}"
        return line

    def shrink(self, shapes: Shapes) -> None:
        """Goes on with fewer slots, and leaves word of it to a run that goes on from here."""
        if shapes.slots >= self.shapes.slots:  # another loop has come to it before
            return
        self.shapes = shapes
        self.sink.write_receipt(with_shapes(self.receipt, shapes, self.settings))
        where = f" in one of {shapes.loops} loops" if shapes.loops > 1 else ""
        warn(f"the device ran out of memory: going on with a batch size of {shapes.slots}{where}")

    def pixels(self, entries: Iterable[Entry]) -> Loading | GpuLoading:
        """Decoder processes at work on `entries`, and the GPU on their JPEGs where it is to be."""
        options, model = self.options, self.captioner.model
        device = model.runtime.device
        start = partial(load, workers=decoder_processes(options, device), timeout=options.decode_timeout)
        of_all: dict[str, Any] = {"spec": model.spec, "max_pixels": options.max_pixels, "facts": options.sink.fields}
        whole = partial(pixels.load, **of_all, fast=options.fast_decode)
        if not options.gpu_decode:
            return start(entries, whole)
        keep = partial(pixels.load_or_keep, **of_all)
        return GpuLoading(entries, GpuJpegDecoder.on(device, model.spec), keep, whole, start)

    @property
    def shows_progress(self) -> bool:
        """Rows that appear on a terminal are progress enough; a bar would run into them."""
        out = self.options.sink.out
        rows_shown = sys.stdout.isatty() and (out == "-" or (out is None and self.options.sink.sidecar is None))
        return not (self.options.quiet or rows_shown)


def wanted_entries(source: Source, sink: Sink, report: Report) -> Iterator[Entry]:
    for entry in source:
        if sink.wants(entry):
            yield entry
        else:
            report.skipped += 1


def numbered(entries: Iterable[Entry], listed: dict[int, Entry]) -> Iterator[Entry]:
    """The entries as they are, each kept in `listed` under its number until its result has come."""
    for index, entry in enumerate(entries):
        listed[index] = entry
        yield entry


def list_only(wanted: Iterable[Entry], report: Report) -> int:
    """A dry run: the names that would be captioned, on standard output."""
    count = 0
    for entry in wanted:
        count += 1
        print(printable(entry.name))
    say(f"{count} would be captioned, {report.skipped} skipped")
    return 0


def counter(source: Source, options: CaptionOptions) -> Callable[[], int] | None:
    """Counts the source anew; None for one that can be read only once, or of which only a part is wanted."""
    if source.streaming or options.limit is not None:
        return None
    return lambda: sum(1 for _ in source)
