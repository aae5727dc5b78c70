"""`capcli prepare` on one page: annotations -> plan -> decoder processes -> shards, each of them whole or not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli.errors import CapcliError
from capcli.interrupts import Interrupts
from capcli.loading import Loading, load, usable_cpus
from capcli.names import printable
from capcli.options import PrepareOptions
from capcli.prepared.download import Downloads
from capcli.prepared.encoding import Encoder, address_of
from capcli.prepared.folder import Done, Folder
from capcli.prepared.plan import Plan, Shard, make_plan
from capcli.prepared.source import read_source
from capcli.progress import Progress, say
from capcli.records import Entry, Failure

HEED = 0.2  # seconds after which a wait shows how far things are


@dataclass(slots=True)
class Report:
    """What a run did so far; `skipped` images were done by an earlier one."""

    stored: int = 0
    failed: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.stored + self.failed

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.began, 1e-9)


def run(options: PrepareOptions) -> int:
    """Write the copy that is asked for, or go on with it; gives the exit code.

    Raises UsageError where the folder holds anything else, CapcliError where there is nothing to store or the run cannot go
    on.
    """
    source = read_source(options)
    plan = make_plan(options, source.splits)
    with Folder(options.out) as folder:
        manifest = folder.manifest()
        if manifest is not None and options.overwrite:
            folder.clear(manifest)
            manifest = None
        if manifest is not None:
            plan.refuse_other(manifest, options.out)
        if manifest is not None and manifest["state"] == "finished":
            folder.check(manifest)
            folder.tidy()
            return close(options, folder, manifest, Report())
        return Run(options, plan, folder, source.failures, manifest or plan.manifest()).store_all(anew=manifest is None)


@dataclass
class Run:
    """A run whose every choice is made."""

    options: PrepareOptions
    plan: Plan
    folder: Folder
    left_out: Sequence[Failure]
    manifest: dict[str, Any]
    report: Report = field(default_factory=Report)

    def store_all(self, *, anew: bool) -> int:
        """Every shard that is not there yet; the exit code. A signal ends the run after the shard under way."""
        try:
            self.folder.begin(self.plan, anew=anew)
            done = {shard: found for shard in self.plan.shards if (found := self.folder.done(shard))}
            wanted = [shard for shard in self.plan.shards if shard not in done]
            self.report.skipped = sum(len(shard.images) for shard in done)
            interrupts = self.store(wanted, done)
            if interrupts.exit_code and len(done) < len(self.plan.shards):
                self.tell(
                    f"{len(done)} of {len(self.plan.shards)} shards are there; the same command goes on from here"
                )
                return interrupts.exit_code
            return self.finish(done)
        except OSError as error:
            raise CapcliError(f"cannot write to {printable(self.options.out)}: {error.strerror or error}") from error

    def store(self, wanted: Sequence[Shard], done: dict[Shard, Done]) -> Interrupts:
        """Store shards, each image a row of its shard or a failure."""
        progress = Progress(self.report, shown=not self.options.quiet, total=lambda: self.plan.count, task="preparing")
        with Interrupts(quiet=self.options.quiet) as interrupts, progress, contextlib.ExitStack() as stack:
            fetched: Downloads | None = None
            if self.options.url_column is not None:
                fetched = stack.enter_context(Downloads(self.options.download, self.folder.work))
            entries = listed(wanted) if fetched is None else fetched.entries(listed(wanted))
            images = stack.enter_context(self.images(entries))
            for shard in wanted:
                if interrupts.asked():
                    break
                done[shard] = self.store_shard(shard, images, progress, fetched)
        return interrupts

    def store_shard(self, shard: Shard, images: Loading, progress: Progress, fetched: Downloads | None) -> Done:
        failures = []
        with self.folder.writer(shard, self.plan) as writer:
            for image in shard.images:
                while (result := images.take(HEED)) is None:
                    progress.update()
                if isinstance(result, Failure):
                    failures.append(result)
                    self.report.failed += 1
                else:
                    writer.add(image, result)
                    self.report.stored += 1
                if fetched is not None:
                    fetched.drop()
                progress.update()
        return self.folder.settle(shard, writer, failures)

    def images(self, entries: Iterator[Entry]) -> Loading:
        """Decoder processes at work on `entries`."""
        settings = self.plan.settings
        encoder = Encoder(settings["edge"], settings["format"], settings["quality"], settings["max_pixels"])
        workers = usable_cpus() if self.options.workers is None else self.options.workers
        return load(entries, encoder, workers=workers, timeout=self.options.decode_timeout)

    def finish(self, done: Mapping[Shard, Done]) -> int:
        failures = [*self.left_out, *(failure for shard in self.plan.shards for failure in done[shard].failures)]
        if not any(each.rows for each in done.values()):
            self.folder.write_failures(failures)
            self.folder.forget(self.plan.shards)  # so that the same command tries them again
            first = next(failure for shard in self.plan.shards for failure in done[shard].failures)
            raise CapcliError(
                f"none of {self.plan.count} images could be read; the first, {printable(first.name)}: {first.message}. "
                f"All are listed in {printable(self.folder.failures)}"
            )
        self.folder.finish(self.plan, self.manifest, done, failures)
        return close(self.options, self.folder, self.manifest, self.report)

    def tell(self, line: str) -> None:
        if not self.options.quiet:
            say(line)


def listed(shards: Sequence[Shard]) -> Iterator[Entry]:
    for shard in shards:
        for image in shard.images:
            yield Entry(image.name, image.name if image.image is None else address_of(image.image))


def close(options: PrepareOptions, folder: Folder, manifest: Mapping[str, Any], report: Report) -> int:
    """The closing line, and the exit code."""
    total = {key: sum(split[key] for split in manifest["splits"].values()) for key in ("rows", "captions", "bytes")}
    line = f"{total['rows']:,} images, {total['captions']:,} captions, {total['bytes'] / 1e6:,.1f} MB"
    if manifest["failures"]:
        line += f"; {manifest['failures']:,} left out ({printable(folder.failures)})"
    line += f"; {report.rate:,.1f} images/s" if report.done else "; all there already"
    if not options.quiet:
        say(line)
    return 3 if manifest["failures"] else 0
