"""The folder of a copy: what is done in it, so that a run that was killed at any instant goes on from there.

`manifest.json` is written first, and says what is going to be there; the last thing written is the same with what is. In
between, `unfinished/` holds what is done of the shard at work and, for each that is done, a note of what it holds and what
it left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from capcli.annotations.data_report import EMPTY, UNREAD
from capcli.errors import CapcliError, UsageError
from capcli.prepare.downloads import sweep
from capcli.prepare.manifest import Shard, ShardPlan
from capcli.prepare.shard_log import ShardLog, begun
from capcli.prepare.shards import ShardWriter, SplitFiles, describe, features_of
from capcli.records import Failure
from capcli.sinks.formats import failure_line
from capcli.storage import atomic, locks, run_file
from capcli.text import printable

MANIFEST, FAILURES, UNFINISHED = "manifest.json", "failures.jsonl", "unfinished"
OURS = {
    MANIFEST,
    FAILURES,
    UNFINISHED,
    f"{MANIFEST}.tmp",
    f"{FAILURES}.tmp",
    "dataset_dict.json",
    "dataset_dict.json.tmp",
}
SHARD = re.compile(r"(train|val)/data-\d{5,}-of-\d{5,}\.arrow")
BESIDE = tuple(
    f"{name}.json{end}" for name in ("state", "dataset_info") for end in ("", ".tmp")
)  # the shards of a split
NOTES = re.compile(r"(train|val)-\d{5,}\.(json|arrow|part)(\.tmp)?")
REMAINS = re.compile(r"(train|val)-\d{5,}\.(arrow|\w+\.tmp)")  # of these, what a kill left half done


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard that is written: `failures` are its images that are not in it, `failed` their positions.

    `again` says that what failed before was tried again for it.
    """

    rows: int
    captions: int
    bytes: int
    sha256: str
    failures: tuple[Failure, ...]
    failed: tuple[int, ...] = ()
    again: bool = False


class PreparedFolder:
    """The folder that a copy is written to, locked while it is entered."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def work(self) -> str:
        """Where what is not finished lies."""
        return os.path.join(self.path, UNFINISHED)

    @property
    def failures(self) -> str:
        return os.path.join(self.path, FAILURES)

    def __enter__(self) -> Self:
        """Make the folder and lock it; UsageError for a file, CapcliError where it cannot be, or another run is at it."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UsageError(f"--out {printable(self.path)} is a file: name a folder")
        try:
            os.makedirs(self.path, exist_ok=True)
            if os.name != "nt":
                self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CapcliError(f"cannot write to {printable(self.path)}: {error.strerror}") from error
        if self._lock is not None and not locks.take(self._lock):
            os.close(self._lock)
            raise CapcliError(f"another run is writing to {printable(self.path)}: wait for it, or name another --out")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def manifest(self) -> dict[str, Any] | None:
        """What an earlier run wrote; None where there is nothing. UsageError where there are other files."""
        names = set(os.listdir(self.path))
        if not names:
            return None
        try:
            with open(os.path.join(self.path, MANIFEST), "rb") as file:
                manifest = json.load(file)
            if not isinstance(manifest, dict) or not {"state", "settings", "splits"} <= manifest.keys():
                raise ValueError
        except FileNotFoundError:
            if names <= OURS:
                return None
            foreign = printable(min(names - OURS))
            raise UsageError(
                f"{printable(self.path)} holds other files ({foreign}): name a new or an empty folder with --out"
            ) from None
        except (OSError, ValueError):
            raise UsageError(
                f"{printable(self.path)} holds a {MANIFEST} of something else: name another --out"
            ) from None
        return manifest

    def damaged(self, manifest: Mapping[str, Any]) -> list[str]:
        """The shards of a finished copy that are no longer what its manifest says."""
        shards = (shard for split in manifest["splits"].values() for shard in split["shards"])
        paths = ((os.path.join(self.path, shard["file"]), shard["bytes"]) for shard in shards)
        return [path for path, size in paths if not os.path.isfile(path) or os.path.getsize(path) != size]

    def own(self, manifest: Mapping[str, Any]) -> list[str]:
        """The files that earlier runs wrote, there or not, but for those in `work`; the manifest last."""
        shards = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
        files = [file for file in shards if SHARD.fullmatch(file)]
        files += [f"{split}/{name}" for split in dict.fromkeys(map(os.path.dirname, files)) for name in BESIDE]
        files += [*sorted(OURS - {UNFINISHED, MANIFEST}), MANIFEST]
        return [os.path.join(self.path, file) for file in files]

    def clear(self, manifest: Mapping[str, Any]) -> None:
        """Remove what an earlier run wrote: its own files, the manifest last, and nothing else."""
        self.tidy()
        files = self.own(manifest)
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for folder in {os.path.dirname(path) for path in files} - {self.path}:
            with contextlib.suppress(OSError):  # it holds what others put there
                os.rmdir(folder)

    def begin(self, plan: ShardPlan, *, anew: bool) -> None:
        """Write down what is going to be there, and make room for it; what a kill left half done goes."""
        if anew:
            run_file.write(os.path.join(self.path, MANIFEST), plan.manifest())
        os.makedirs(self.work, exist_ok=True)
        for name in plan.splits:
            os.makedirs(os.path.join(self.path, name), exist_ok=True)
        sweep(self.work, REMAINS)

    def reopen(self, plan: ShardPlan, manifest: dict[str, Any]) -> None:
        """Make a finished copy an unfinished one, all of whose shards are noted as done; it can be read all the time."""
        os.makedirs(self.work, exist_ok=True)
        reasons = iter(self._reasons(manifest))
        for name, shards in plan.splits.items():
            for shard, entry in zip(shards, manifest["splits"][name]["shards"], strict=True):
                failed = tuple(map(int, entry["failed"].split()))
                failures = tuple(Failure(shard.images[position].name, *next(reasons)) for position in failed)
                held = {key: entry[key] for key in ("rows", "captions", "bytes", "sha256")}
                self._write_note(shard, WrittenShard(**held, failures=failures, failed=failed))
        self._restate(manifest, {"state": "unfinished"})

    def _reasons(self, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Why each image of a finished copy failed, shard by shard; what is left out otherwise is listed before them."""
        count = sum(len(shard["failed"].split()) for split in manifest["splits"].values() for shard in split["shards"])
        try:
            with open(self.failures, "rb") as file:
                rows = [json.loads(line) for line in file][-count:] if count else []
            reasons = [(str(row["error"]), str(row["message"])) for row in rows]
        except (OSError, ValueError, TypeError, KeyError):
            reasons = []
        lost = [("unknown", "the list of failures is damaged: --retry-failed tries the image again")]
        return reasons if len(reasons) == count else lost * count

    def try_again(self, manifest: dict[str, Any]) -> None:
        """From now on what failed before is to be done."""
        self._restate(manifest, {"again": True})

    def _restate(self, manifest: dict[str, Any], what: Mapping[str, Any]) -> None:
        manifest |= what
        run_file.write(os.path.join(self.path, MANIFEST), manifest)

    def done(self, shard: Shard) -> WrittenShard | None:
        """What is known of a shard that is written, by its note; None where it is still to be done."""
        try:
            with open(self._note(shard), "rb") as file:
                note = json.load(file)
            failures = tuple(Failure(**failure) for failure in note.pop("failures"))
            done = WrittenShard(**note | {"failed": tuple(note.get("failed", ()))}, failures=failures)
            return done if os.path.getsize(self.file(shard)) == done.bytes else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def file(self, shard: Shard) -> str:
        return os.path.join(self.path, shard.file)

    def _note(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.json")

    def _write_note(self, shard: Shard, done: WrittenShard) -> None:
        atomic.replace(self._note(shard), [json.dumps(asdict(done)).encode()])

    def begun(self, shard: Shard, *, again: bool) -> frozenset[int]:
        """The positions of the images that are done in a shard that is not."""
        return begun(self._part(shard), again=again)

    def part(self, shard: Shard, *, again: bool) -> ShardLog:
        return ShardLog(self._part(shard), again=again)

    def _part(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.part")

    def writer(self, shard: Shard, plan: ShardPlan) -> ShardWriter:
        return ShardWriter(
            os.path.join(self.work, f"{shard.label}.arrow"), features_of(odd_names=plan.odd_names, tagged=plan.tagged)
        )

    def settle(
        self, shard: Shard, writer: ShardWriter, failures: Mapping[int, Failure], *, again: bool
    ) -> WrittenShard:
        """Put a shard that is written where it belongs; its note first, which is good only of a file of that size."""
        temporary = os.path.join(self.work, f"{shard.label}.arrow")
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.path.getsize(temporary)
        done = WrittenShard(
            writer.rows, writer.captions, size, digest, tuple(failures.values()), tuple(failures), again
        )
        self._write_note(shard, done)
        atomic.settle(temporary, self.file(shard))
        os.unlink(self._part(shard))
        return done

    def finish(
        self, plan: ShardPlan, manifest: dict[str, Any], done: Mapping[Shard, WrittenShard], failures: Sequence[Failure]
    ) -> None:
        """Make the copy whole: what was left out, what `datasets` wants, and the manifest of what is there."""
        self.write_failures(failures)
        splits = []
        for name, shards in plan.splits.items():
            found = [done[shard] for shard in shards]
            held = manifest["splits"][name]
            held |= {key: sum(getattr(each, key) for each in found) for key in ("rows", "captions", "bytes")}
            for entry, each in zip(held["shards"], found, strict=True):
                entry |= {key: getattr(each, key) for key in ("rows", "captions", "bytes", "sha256")}
                entry |= {"failed": " ".join(map(str, each.failed))}  # a list would be a line for each
            digest = hashlib.sha256("".join(each.sha256 for each in found).encode()).hexdigest()
            splits.append(SplitFiles(name, [shard.file for shard in shards], digest))
        describe(self.path, splits, features_of(odd_names=plan.odd_names, tagged=plan.tagged))
        manifest.pop("again", None)
        empty, unread = (sum(failure.error == kind for failure in failures) for kind in (EMPTY, UNREAD))
        left_out = {"images_left_out": len(failures) - empty - unread, "empty_captions": empty, "unread_rows": unread}
        self._restate(manifest, {"state": "finished", **left_out})
        self.tidy()

    def write_failures(self, failures: Sequence[Failure]) -> None:
        """List what was left out; without any there is no such file."""
        if failures:
            atomic.replace(self.failures, map(failure_line, failures))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.failures)

    def tidy(self) -> None:
        """Nothing is unfinished any more."""
        sweep(self.work, NOTES)
        with contextlib.suppress(OSError):
            os.rmdir(self.work)

    def forget(self, shards: Sequence[Shard]) -> None:
        """These are to be done again by the next run."""
        for shard in shards:
            for path in (self._note(shard), self.file(shard)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
