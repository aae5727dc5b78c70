"""`capcli prepare` on one page: annotations -> plan -> decoder processes -> shards, each of them whole or not there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from capcli.annotations.data_report import MISSING
from capcli.errors import CapcliError
from capcli.interrupts import Interrupts
from capcli.loading import Loading, load, usable_cpus
from capcli.options import PrepareOptions
from capcli.prepare.downloads import Downloads
from capcli.prepare.encoding import Encoder, address_of
from capcli.prepare.folder import PreparedFolder, WrittenShard
from capcli.prepare.listing import read_source, refuse_own
from capcli.prepare.manifest import Shard, ShardPlan, make_plan
from capcli.prepare.shards import stored_copies
from capcli.progress import Progress, say
from capcli.records import Annotated, Entry, Failure, Loaded
from capcli.text import brief, counted, printable

POLL_SECONDS = 0.2  # seconds after which a wait shows how far things are
GRACE = 5.0  # seconds after an interrupt in which what is under way may still come
PROVEN_BY = 16  # images, one of which is mostly good


class StoppedError(Exception):
    """The run was interrupted, and what was under way is kept."""


@dataclass(slots=True)
class PrepareReport:
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
    with PreparedFolder(options.out) as folder:
        manifest = folder.manifest()
        run = PrepareRun(options, plan, folder, source.failures, manifest or plan.manifest())
        if manifest is None:
            return run.store_all(anew=True)
        refuse_own(options, source, folder.own(manifest))
        if options.overwrite:
            run.prove()
            folder.clear(manifest)
            return PrepareRun(options, plan, folder, source.failures, plan.manifest()).store_all(anew=True)
        plan.refuse_other(manifest, options.out)
        if manifest["state"] == "finished":
            damaged = folder.damaged(manifest)
            if not damaged and not (options.retry_failed and manifest["images_left_out"]):
                folder.tidy()
                return close(options, folder, manifest, PrepareReport())
            for path in damaged:
                run.tell(f"{printable(path)} is not as it was written, or gone: it is made anew")
            folder.reopen(plan, manifest)
        if options.retry_failed and not manifest.get("again"):  # else that is what the run goes on with
            folder.try_again(manifest)
        return run.store_all(anew=False)


@dataclass(frozen=True, eq=False)
class ShardWork:
    """A shard to be made: of a file that is there (`earlier`) what it lacks, else all; but what is `begun` already."""

    shard: Shard
    earlier: WrittenShard | None
    begun: frozenset[int]

    @property
    def wanted(self) -> list[int]:
        """The positions of the images that are to be had."""
        positions = range(len(self.shard.images)) if self.earlier is None else self.earlier.failed
        return [position for position in positions if position not in self.begun]

    @property
    def kept(self) -> list[Annotated]:
        """The images whose copies are taken from the file that is there."""
        failed = () if self.earlier is None else set(self.earlier.failed)
        return [] if self.earlier is None else [i for n, i in enumerate(self.shard.images) if n not in failed]


@dataclass
class PrepareRun:
    """A run whose every choice is made."""

    options: PrepareOptions
    plan: ShardPlan
    folder: PreparedFolder
    left_out: Sequence[Failure]
    manifest: dict[str, Any]
    report: PrepareReport = field(default_factory=PrepareReport)

    @property
    def again(self) -> bool:
        """Whether what failed before is tried again."""
        return bool(self.manifest.get("again"))

    def prove(self) -> None:
        """Raises CapcliError where no image at all can be had: nothing is to be overwritten for that."""
        first: Failure | None = None
        for most in (PROVEN_BY, None):
            entries = islice(listed(ShardWork(shard, None, frozenset()) for shard in self.plan.shards), most)
            with self.at_work(entries) as (images, drop):
                for result in images:
                    drop()
                    if isinstance(result, Loaded):
                        return
                    first = first or result
        reason = "" if first is None else f"; the first, {brief(first.name)}: {first.message}"
        raise CapcliError(
            f"none of {counted(self.plan.count, 'image')} could be read{reason}. "
            f"{printable(self.options.out)} is left as it is"
        )

    def store_all(self, *, anew: bool) -> int:
        """Every shard that is not there yet; the exit code. A signal ends the run, and what is done is kept."""
        try:
            self.folder.begin(self.plan, anew=anew)
            done: dict[Shard, WrittenShard] = {}
            works: list[ShardWork] = []
            for shard in self.plan.shards:
                found = self.folder.done(shard)
                if found is not None and not (self.again and found.failures and not found.again):
                    done[shard] = found
                else:
                    works.append(ShardWork(shard, found, self.folder.begun(shard, again=self.again)))
            self.report.skipped = self.plan.count - sum(len(work.wanted) for work in works)
            interrupts = self.store(works, done)
            if interrupts.exit_code and len(done) < len(self.plan.shards):
                there, of = self.report.skipped + self.report.done, counted(self.plan.count, "image")
                self.tell(f"{there:,} of {of} {'is' if there == 1 else 'are'} done; the same command goes on from here")
                return interrupts.exit_code
            return self.finish(done)
        except OSError as error:
            raise CapcliError(f"cannot write to {printable(self.options.out)}: {error.strerror or error}") from error

    def store(self, works: Sequence[ShardWork], done: dict[Shard, WrittenShard]) -> Interrupts:
        """Store shards, each image a row of its shard or a failure."""
        progress = Progress(self.report, shown=not self.options.quiet, total=lambda: self.plan.count, task="preparing")
        with (
            Interrupts(quiet=self.options.quiet) as interrupts,
            progress,
            self.at_work(until(interrupts.asked, listed(works))) as (images, drop),
            contextlib.suppress(StoppedError),
        ):
            results = self.results(images, drop, interrupts, progress)
            for work in works:
                done[work.shard] = self.store_shard(work, results)
        return interrupts

    def store_shard(self, work: ShardWork, results: Iterator[Loaded | Failure]) -> WrittenShard:
        """Write a shard, of what is done of it already and of `results`; raises StoppedError where these break off."""
        shard, wanted = work.shard, set(work.wanted)
        failures: dict[int, Failure] = {}
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(self.folder.writer(shard, self.plan))
            part = stack.enter_context(self.folder.part(shard, again=self.again))
            kept = stored_copies(self.folder.file(shard), work.kept) if work.earlier is not None else iter(())
            stack.callback(getattr(kept, "close", int))
            for position, image in enumerate(shard.images):
                if position in wanted:
                    result = located(next(results), image)
                    part.add(position, result)
                else:
                    result = part.read(position, image.name) if position in part else next(kept)
                if isinstance(result, Failure):
                    failures[position] = result
                else:
                    writer.add(image, result)
        return self.folder.settle(shard, writer, failures, again=self.again)

    def results(
        self, images: Loading, drop: Callable[[], None], interrupts: Interrupts, progress: Progress
    ) -> Iterator[Loaded | Failure]:
        """What comes of the images, until all came or, a moment after an interrupt, StoppedError is raised."""
        last = float("inf")
        while True:
            if interrupts.asked():
                last = min(last, time.monotonic() + GRACE)
            result = images.take(POLL_SECONDS)
            if result is not None:
                drop()
                self.report.failed += isinstance(result, Failure)
                self.report.stored += isinstance(result, Loaded)
                yield result
            progress.update()
            if interrupts.asked() and (images.done or time.monotonic() > last):
                raise StoppedError

    @contextlib.contextmanager
    def at_work(self, entries: Iterable[Entry]) -> Iterator[tuple[Loading, Callable[[], None]]]:
        """Decoder processes at work on `entries`, fetched where they are addresses; and what to call after each."""
        settings = self.plan.settings
        encoder = Encoder(settings["edge"], settings["format"], settings["quality"], settings["max_pixels"])
        workers = usable_cpus() if self.options.workers is None else self.options.workers
        with contextlib.ExitStack() as stack:
            drop: Callable[[], None] = lambda: None  # noqa: E731
            if self.options.url_column is not None:
                fetched = stack.enter_context(Downloads(self.options.download, self.folder.work))
                entries, drop = fetched.entries(entries), fetched.drop
            yield (
                stack.enter_context(load(entries, encoder, workers=workers, timeout=self.options.decode_timeout)),
                drop,
            )

    def finish(self, done: Mapping[Shard, WrittenShard]) -> int:
        failures = [*self.left_out, *(failure for shard in self.plan.shards for failure in done[shard].failures)]
        if not any(each.rows for each in done.values()):
            self.folder.write_failures(failures)
            self.folder.forget(self.plan.shards)  # so that the same command tries them again
            first = next(failure for shard in self.plan.shards for failure in done[shard].failures)
            raise CapcliError(
                f"none of {counted(self.plan.count, 'image')} could be read; the first, {brief(first.name)}: {first.message}. "
                f"All are listed in {printable(self.folder.failures)}"
            )
        self.folder.finish(self.plan, self.manifest, done, failures)
        return close(self.options, self.folder, self.manifest, self.report)

    def tell(self, line: str) -> None:
        if not self.options.quiet:
            say(line)


def listed(works: Iterable[ShardWork]) -> Iterator[Entry]:
    for work in works:
        for image in map(work.shard.images.__getitem__, work.wanted):
            yield Entry(image.name, image.name if image.image is None else address_of(image.image))


def located(result: Loaded | Failure, image: Annotated) -> Loaded | Failure:
    """With the path of a file that is missing: it was this program that made it of the image's name."""
    if isinstance(result, Failure) and result.error == MISSING and isinstance(image.image, str):
        return replace(result, message=f"{result.message}: {printable(image.image)}")
    return result


def until(ended: Callable[[], bool], entries: Iterator[Entry]) -> Iterator[Entry]:
    while not ended() and (entry := next(entries, None)):
        yield entry


def close(options: PrepareOptions, folder: PreparedFolder, manifest: Mapping[str, Any], report: PrepareReport) -> int:
    """The closing line, and the exit code."""
    total = {key: sum(split[key] for split in manifest["splits"].values()) for key in ("rows", "captions", "bytes")}
    line = f"{counted(total['rows'], 'image')}, {counted(total['captions'], 'caption')}, {total['bytes'] / 1e6:,.1f} MB"
    kinds = {"images_left_out": "image", "empty_captions": "empty caption", "unread_rows": "unreadable row"}
    left_out = [counted(manifest[key], word) for key, word in kinds.items() if manifest.get(key)]
    if left_out:
        told = " and ".join(filter(None, (", ".join(left_out[:-1]), left_out[-1])))
        line += f"; {told} left out ({printable(folder.failures)})"
    line += f"; {report.rate:,.1f} images/s" if report.done else "; all there already"
    if not report.done and manifest["images_left_out"]:
        line += " (--retry-failed tries again what was left out)"
    if not options.quiet:
        say(line)
    return 3 if manifest["images_left_out"] or manifest.get("unread_rows") else 0
