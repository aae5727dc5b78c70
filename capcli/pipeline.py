"""Read this first: source -> pixels -> captions -> sinks, on one page."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import torch

from capcli import pixels
from capcli.captioner import Captioner
from capcli.decoding.capacity import paying_slots
from capcli.decoding.loop import Shapes
from capcli.decoding.settings import Settings, idle, resolve
from capcli.errors import CapcliError
from capcli.interrupts import Interrupts
from capcli.loading import Loading, default_workers, load, usable_cpus
from capcli.models.build import choose_device, choose_dtype, load_model, own_generation
from capcli.models.hub import resolve as find_model
from capcli.names import printable
from capcli.options import CaptionOptions
from capcli.progress import Progress, Report, say
from capcli.provenance import earlier_naming, earlier_shapes, finished, make_receipt, refuse_other_settings
from capcli.records import Caption, Entry, Failure
from capcli.runtimes.cpu import keep_memory_mapped
from capcli.sinks import ClosedPipeError, Sink, open_sink
from capcli.sources import Source, open_source


def run(options: CaptionOptions) -> int:
    """Caption every image of the source that is not captioned yet; gives the exit code.

    Raises UsageError for a wrong command, before any model is loaded, and CapcliError when the run cannot go on.
    """
    with open_sink(options.sink, warn) as sink:
        source = open_source(options.source, warn, earlier_naming(sink.receipt))
        report = Report()
        wanted: Iterator[Entry] = islice(wanted_entries(source, sink, report), options.limit)
        if options.dry_run:
            return list_only(wanted, report)
        captioner = load_captioner(options, sink.receipt)
        settings = search_settings(options, captioner)
        count, wanted = count_ahead(wanted, source, paying_slots(captioner.model.device, settings))
        shapes = choose_shapes(options, captioner, settings, count, earlier_shapes(sink.receipt))
        receipt = make_receipt(options, source, captioner, settings, shapes)
        refuse_other_settings(sink.receipt, receipt, options.sink.out)
        sink.begin(receipt)
        try:
            code = Run(options, captioner, settings, shapes, sink, report).caption_all(wanted, counter(source, options))
        except ClosedPipeError:
            return 0
        sink.write_receipt(finished(receipt, report, sink, "finished" if code in (0, 3) else "interrupted"))
    return code


@dataclass
class Run:
    """A run whose every choice is made."""

    options: CaptionOptions
    captioner: Captioner
    settings: Settings
    shapes: Shapes
    sink: Sink
    report: Report

    def caption_all(self, wanted: Iterable[Entry], total: Callable[[], int] | None) -> int:
        """source -> pixels -> captions -> sinks; the exit code. A signal ends it once what is under way is done."""
        listed: dict[int, Entry] = {}

        def deliver(index: int, result: Caption | Failure) -> None:
            self.sink.write(listed.pop(index), result)
            self.report.add(result)
            progress.update()

        with (
            Interrupts(quiet=self.options.quiet) as interrupts,
            Progress(self.report, shown=self.shows_progress, total=total) as progress,
            self.pixels(numbered(wanted, listed)) as arrivals,
        ):
            for _ in self.captioner.run(
                arrivals,
                self.settings,
                self.shapes,
                deliver,
                ordered=self.options.order == "source",
                before=self.settings.prompt[1:] if self.options.keep_prompt else (),
                stop=interrupts.asked,
                shrunk=tell_shrunk,
            ):
                progress.update()
        self.report.on_record = self.sink.failures_on_record - self.report.failed
        if not self.options.quiet:
            say(self.report.line())
        return interrupts.exit_code or self.report.exit_code

    def pixels(self, entries: Iterable[Entry]) -> Loading:
        """Decoder processes at work on `entries`."""
        options, device = self.options, self.captioner.model.device
        decode = partial(
            pixels.load, spec=self.captioner.model.spec, max_pixels=options.max_pixels, facts=options.sink.fields
        )
        workers = options.workers
        if workers is None:
            workers = default_workers(usable_cpus(), on_gpu=device.type == "cuda")
        return load(entries, decode, workers=workers, timeout=options.decode_timeout)

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


def load_captioner(options: CaptionOptions, receipt: dict[str, Any] | None) -> Captioner:
    """The captioner, in the dtype and on as many threads as an earlier run had, unless these are asked for."""
    earlier = receipt or {}
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_memory_mapped()
    files = find_model(options.model, options.revision, quiet=options.quiet)
    own = own_generation(files)
    if own is not None:
        resolve(own, options.generation)  # what is wrong with the settings is told before the weights are read
    dtype: str = options.dtype
    if dtype == "auto":
        dtype = earlier.get("settings", {}).get("dtype") or choose_dtype("auto", device)
    threads = options.threads or earlier.get("threads") or min(torch.get_num_threads(), usable_cpus())
    torch.set_num_threads(threads)
    return Captioner(load_model(files, device, dtype), files)


def search_settings(options: CaptionOptions, captioner: Captioner) -> Settings:
    settings = captioner.settings(options.generation, options.prompt)
    for line in idle(options.generation, settings):
        warn(line)
    if settings.num_return_sequences > 1 and not options.sink.candidates:
        n = settings.num_return_sequences
        raise CapcliError(
            f"the model's generation_config asks for {n} captions per image: say --num-return-sequences {n}, or 1"
        )
    return settings


def count_ahead(wanted: Iterator[Entry], source: Source, most: int) -> tuple[int | None, Iterator[Entry]]:
    """How many images there are, where that is fewer than `most` and can be known; and all of them again."""
    if source.streaming:
        return None, wanted
    first = list(islice(wanted, most))
    return len(first) if len(first) < most else None, chain(first, wanted)


def choose_shapes(
    options: CaptionOptions, captioner: Captioner, settings: Settings, count: int | None, earlier: Shapes | None
) -> Shapes:
    """The shapes of an earlier run, so that captions stay the same to the bit, unless others are asked for."""
    if earlier is not None and options.batch_size in (None, earlier.slots):
        return earlier
    return captioner.shapes(settings, count, options.batch_size)


def counter(source: Source, options: CaptionOptions) -> Callable[[], int] | None:
    """Counts the source anew; None for one that can be read only once, or of which only a part is wanted."""
    if source.streaming or options.limit is not None:
        return None
    return lambda: sum(1 for _ in source)


def tell_shrunk(shapes: Shapes) -> None:
    warn(f"the device ran out of memory: going on with a batch size of {shapes.slots}")


def warn(line: str) -> None:
    say(f"capcli: {line}")
