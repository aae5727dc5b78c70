"""The main function of `capcli prepare`: annotations -> plan -> decoder processes -> shards, each written atomically."""

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
from capcli.prepare.encoding import Encoder
from capcli.prepare.folder import PreparedFolder, WrittenShard
from capcli.prepare.shard_plan import Shard, ShardPlan, make_plan, read_data, refuse_overwriting_data
from capcli.prepare.shards import stored_copies
from capcli.progress import OneStage, Progress, say
from capcli.records import Annotated, Entry, Failure, Loaded
from capcli.sources.dataset_images import address_of
from capcli.text import brief, counted, printable

POLL_SECONDS = 0.2  # between updates of the progress bar while no image arrives
GRACE_SECONDS = 5.0  # after an interrupt, for images in progress to finish
FIRST_TRIED = 16  # images that are read before a copy is overwritten; all of them if these fail


class StoppedError(Exception):
    """The run was interrupted; what is in the logs is kept."""


@dataclass(slots=True)
class PrepareReport:
    """Counts of this run; `skipped` images were done by an earlier one."""

    stored: int = 0
    failed: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        return self.stored + self.failed

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.done / max(time.monotonic() - self.began, 1e-9)


def run(options: PrepareOptions) -> int:
    """Writes a copy, or resumes an unfinished one; returns the exit code.

    Raises UsageError where the folder has anything else, and CapcliError where there is nothing to store or the run
    cannot continue.
    """
    data = read_data(options)
    plan = make_plan(options, {"train": data.train, "val": data.val})
    with PreparedFolder(options.out) as folder:
        manifest = folder.manifest()
        run = PrepareRun(options, plan, folder, data.report.failures, manifest or plan.manifest())
        if manifest is None:
            return run.store_all(new=True)
        refuse_overwriting_data(options, data, folder.written_files(manifest))
        if options.overwrite:
            run.check_readable()
            folder.clear(manifest)
            return PrepareRun(options, plan, folder, data.report.failures, plan.manifest()).store_all(new=True)
        plan.refuse_other(manifest, options.out)
        if manifest["state"] == "finished":
            shards = folder.damaged_shards(plan, manifest)
            damaged = [*map(folder.file, shards), *folder.damaged_descriptions(plan, manifest)]
            if not damaged and not (options.retry_failed and manifest["images_left_out"]):
                folder.remove_unfinished()
                return report_end(options, folder, manifest, PrepareReport())
            for path in damaged:
                run.say(f"{printable(path)} is missing or damaged: it is written again")
            folder.reopen(plan, manifest, shards)
        if options.retry_failed and not manifest.get("again"):  # else the interrupted run was a retry already
            folder.begin_retry(manifest)
        return run.store_all(new=False)


@dataclass(frozen=True, eq=False)
class ShardWork:
    """A shard to write: all of its images, or those that failed in an `earlier` file; except those `logged` already."""

    shard: Shard
    earlier: WrittenShard | None
    logged: frozenset[int]

    @property
    def wanted(self) -> list[int]:
        """The positions of the images to decode."""
        positions = range(len(self.shard.images)) if self.earlier is None else self.earlier.failed
        return [position for position in positions if position not in self.logged]

    @property
    def kept(self) -> list[Annotated]:
        """The images whose copies are taken from the earlier file."""
        if self.earlier is None:
            return []
        failed = set(self.earlier.failed)
        return [image for position, image in enumerate(self.shard.images) if position not in failed]


@dataclass
class PrepareRun:
    """One run, with its plan and folder. `left_out` are failures of the data before any image is read."""

    options: PrepareOptions
    plan: ShardPlan
    folder: PreparedFolder
    left_out: Sequence[Failure]
    manifest: dict[str, Any]
    report: PrepareReport = field(default_factory=PrepareReport)

    @property
    def retry(self) -> bool:
        """Whether images that failed in earlier runs are tried again."""
        return bool(self.manifest.get("again"))

    def check_readable(self) -> None:
        """Raises CapcliError if no image can be read: an existing copy is then not overwritten."""
        first: Failure | None = None
        for most in (FIRST_TRIED, None):
            entries = islice(entries_of(ShardWork(shard, None, frozenset()) for shard in self.plan.shards), most)
            with self.decoding(entries) as (images, drop):
                for result in images:
                    drop()
                    if isinstance(result, Loaded):
                        return
                    first = first or result
        reason = "" if first is None else f"; the first, {brief(first.name)}: {first.message}"
        raise CapcliError(
            f"none of {counted(self.plan.count, 'image')} could be read{reason}. "
            f"{printable(self.options.out)} is not changed"
        )

    def store_all(self, *, new: bool) -> int:
        """Writes the shards that are not written yet; returns the exit code. A signal ends the run; what is done is kept."""
        try:
            self.folder.begin(self.plan, new=new)
            written: dict[Shard, WrittenShard] = {}
            work: list[ShardWork] = []
            for shard in self.plan.shards:
                earlier = self.folder.written_shard(shard)
                if earlier is not None and not (self.retry and earlier.failures and not earlier.retried):
                    written[shard] = earlier
                else:
                    work.append(ShardWork(shard, earlier, self.folder.logged(shard, retry=self.retry)))
            self.report.skipped = self.plan.count - sum(len(each.wanted) for each in work)
            interrupts = self.store(work, written)
            if interrupts.exit_code and len(written) < len(self.plan.shards):
                done, total = self.report.skipped + self.report.done, counted(self.plan.count, "image")
                self.say(f"{done:,} of {total} done; run the same command again to continue from here")
                return interrupts.exit_code
            return self.finish(written)
        except OSError as error:
            raise CapcliError(f"cannot write to {printable(self.options.out)}: {error.strerror or error}") from error

    def store(self, work: Sequence[ShardWork], written: dict[Shard, WrittenShard]) -> Interrupts:
        """Writes these shards and adds them to `written`, until done or interrupted."""
        progress = Progress(
            self.report, shown=not self.options.quiet, total=lambda: self.plan.count, work=OneStage("preparing")
        )
        with (
            Interrupts(quiet=self.options.quiet) as interrupts,
            progress,
            self.decoding(until(interrupts.asked, entries_of(work))) as (images, drop),
            contextlib.suppress(StoppedError),
        ):
            results = self.results(images, drop, interrupts, progress)
            for each in work:
                written[each.shard] = self.store_shard(each, results)
        return interrupts

    def store_shard(self, work: ShardWork, results: Iterator[Loaded | Failure]) -> WrittenShard:
        """Writes a shard from its log, its earlier file and `results`; each image becomes a row or a failure.

        StoppedError, which `results` raises at an interrupt, leaves the log.
        """
        shard, wanted = work.shard, set(work.wanted)
        failures: dict[int, Failure] = {}
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(self.folder.writer(shard, self.plan))
            log = stack.enter_context(self.folder.log(shard, retry=self.retry))
            kept = stored_copies(self.folder.file(shard), work.kept) if work.earlier is not None else iter(())
            stack.callback(getattr(kept, "close", int))
            for position, image in enumerate(shard.images):
                if position in wanted:
                    result = with_path(next(results), image)
                    log.add(position, result)
                else:
                    result = log.read(position, image.name) if position in log else next(kept)
                if isinstance(result, Failure):
                    failures[position] = result
                else:
                    writer.add(image, result)
        return self.folder.settle(shard, writer, failures, retried=self.retry)

    def results(
        self, images: Loading, drop: Callable[[], None], interrupts: Interrupts, progress: Progress
    ) -> Iterator[Loaded | Failure]:
        """The results of all images, in order. Raises StoppedError GRACE_SECONDS after an interrupt, or earlier if no
        image is in progress."""
        deadline = float("inf")
        while True:
            if interrupts.asked():
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            result = images.take(POLL_SECONDS)
            if result is not None:
                drop()
                self.report.failed += isinstance(result, Failure)
                self.report.stored += isinstance(result, Loaded)
                yield result
            progress.update()
            if interrupts.asked() and (images.done or time.monotonic() > deadline):
                raise StoppedError

    @contextlib.contextmanager
    def decoding(self, entries: Iterable[Entry]) -> Iterator[tuple[Loading, Callable[[], None]]]:
        """Decoder processes that read `entries`, downloaded if they are URLs; and a function to call after each result."""
        settings = self.plan.settings
        encoder = Encoder(settings["edge"], settings["format"], settings["quality"], settings["max_pixels"])
        workers = usable_cpus() if self.options.workers is None else self.options.workers
        with contextlib.ExitStack() as stack:
            drop: Callable[[], None] = lambda: None  # noqa: E731
            if self.options.url_column is not None:
                downloads = stack.enter_context(Downloads(self.options.download, self.folder.work))
                entries, drop = downloads.entries(entries), downloads.drop
            images = load(entries, encoder, workers=workers, timeout=self.options.decode_timeout)
            yield stack.enter_context(images), drop

    def finish(self, written: Mapping[Shard, WrittenShard]) -> int:
        """Completes the folder; returns the exit code. Raises CapcliError if no image could be read."""
        failed = [failure for shard in self.plan.shards for failure in written[shard].failures]
        failures = [*self.left_out, *failed]
        if not any(shard.rows for shard in written.values()):
            self.folder.write_failures(failures)
            self.folder.forget(self.plan.shards)  # so that the same command tries them again
            raise CapcliError(
                f"none of {counted(self.plan.count, 'image')} could be read; the first, {brief(failed[0].name)}: "
                f"{failed[0].message}. All are listed in {printable(self.folder.failures)}"
            )
        self.folder.finish(self.plan, self.manifest, written, failures)
        return report_end(self.options, self.folder, self.manifest, self.report)

    def say(self, line: str) -> None:
        if not self.options.quiet:
            say(line)


def entries_of(work: Iterable[ShardWork]) -> Iterator[Entry]:
    """The images to decode: each name with its address, or its URL, which is the name where nothing was located."""
    for each in work:
        for image in map(each.shard.images.__getitem__, each.wanted):
            yield Entry(image.name, image.name if image.image is None else address_of(image.image))


def with_path(result: Loaded | Failure, image: Annotated) -> Loaded | Failure:
    """The result; if the file is missing, its message also gives the path, which was composed from the image's name."""
    if isinstance(result, Failure) and result.error == MISSING and isinstance(image.image, str):
        return replace(result, message=f"{result.message}: {printable(image.image)}")
    return result


def until(ended: Callable[[], bool], entries: Iterator[Entry]) -> Iterator[Entry]:
    """The entries up to the moment at which `ended` is true."""
    while not ended() and (entry := next(entries, None)):
        yield entry


def report_end(
    options: PrepareOptions, folder: PreparedFolder, manifest: Mapping[str, Any], report: PrepareReport
) -> int:
    """Prints the summary of a finished copy; returns the exit code."""
    total = {key: sum(split[key] for split in manifest["splits"].values()) for key in ("rows", "captions", "bytes")}
    line = f"{counted(total['rows'], 'image')}, {counted(total['captions'], 'caption')}, {total['bytes'] / 1e6:,.1f} MB"
    kinds = {"images_left_out": "image", "empty_captions": "empty caption", "unread_rows": "unreadable row"}
    left_out = [counted(manifest[key], kind) for key, kind in kinds.items() if manifest.get(key)]
    if left_out:
        listed = " and ".join(filter(None, (", ".join(left_out[:-1]), left_out[-1])))
        line += f"; {listed} left out ({printable(folder.failures)})"
    line += f"; {report.rate:,.1f} images/s" if report.done else "; the copy was already complete"
    if not report.done and manifest["images_left_out"]:
        line += " (--retry-failed tries again what was left out)"
    if not options.quiet:
        say(line)
    return 3 if manifest["images_left_out"] or manifest.get("unread_rows") else 0
