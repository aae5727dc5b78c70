"""The folder of a prepared copy, and its state on disk: a run that is killed at any instant can be resumed.

`manifest.json` is written first, with the plan, and again last, with what was written. In between, `unfinished/` has for
each finished shard a note of its rows and failures, and for the current shard the log of its images.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from capcli.annotations.data_report import EMPTY, UNREAD
from capcli.errors import CapcliError, UsageError
from capcli.prepare.downloads import remove_files
from capcli.prepare.shard_plan import Shard, ShardPlan
from capcli.prepare.shards import (
    ShardLog,
    ShardWriter,
    SplitFiles,
    describe,
    descriptions,
    features_of,
    logged_positions,
)
from capcli.records import Failure
from capcli.sinks.row_formats import failure_line
from capcli.storage import atomic, locks, run_file
from capcli.text import printable

MANIFEST, FAILURES, UNFINISHED, DATASET = "manifest.json", "failures.jsonl", "unfinished", "dataset_dict.json"
# with the temporary files that earlier versions left: `.tmp`
OWN_NAMES = {UNFINISHED, *(f"{name}{end}" for name in (MANIFEST, FAILURES, DATASET) for end in ("", ".tmp"))}
SHARD_FILE = re.compile(r"(train|val)/data-\d{5,}-of-\d{5,}\.arrow")
SPLIT_FILES = tuple(f"{name}.json{end}" for name in ("state", "dataset_info") for end in ("", ".tmp"))
UNFINISHED_FILE = re.compile(r"(train|val)-\d{5,}\.(json|arrow|part)(\.tmp)?")
INCOMPLETE_FILE = re.compile(r"(train|val)-\d{5,}\.(arrow|\w+\.tmp)")  # left by a killed run, not usable


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard that is written.

    `failures` are its images that are not in the file, `failed` their positions. `retried`: written while
    `--retry-failed` was in force.
    """

    rows: int
    captions: int
    bytes: int
    sha256: str
    failures: tuple[Failure, ...]
    failed: tuple[int, ...] = ()
    retried: bool = False

    def to_json(self) -> dict[str, Any]:
        note = asdict(self)
        return note | {"again": note.pop("retried")}

    @classmethod
    def from_json(cls, note: Mapping[str, Any]) -> Self:
        """Raises TypeError or KeyError where the note is damaged."""
        values: dict[str, Any] = {"again": False, "failed": ()} | dict(note)
        failures = tuple(Failure(**failure) for failure in values.pop("failures"))
        failed, retried = tuple(values.pop("failed")), values.pop("again")
        return cls(**values, failures=failures, failed=failed, retried=retried)


class PreparedFolder:
    """The folder that a copy is written to; locked inside the `with` block."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock: int | None = None

    @property
    def work(self) -> str:
        """The folder of unfinished shards."""
        return os.path.join(self.path, UNFINISHED)

    @property
    def failures(self) -> str:
        return os.path.join(self.path, FAILURES)

    def __enter__(self) -> Self:
        """Makes and locks the folder. Raises UsageError for a file or links in it, and CapcliError where that fails."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise UsageError(f"--out {printable(self.path)} is a file: name a folder")
        if os.path.islink(self.work):
            raise UsageError(f"{printable(self.work)} is a link, which is not followed: remove it")
        try:
            os.makedirs(self.path, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CapcliError(f"cannot write to {printable(self.path)}: {error.strerror}") from error
        if not locks.take(self._lock):
            os.close(self._lock)
            raise CapcliError(f"another run is writing to {printable(self.path)}: wait for it, or name another --out")
        for folder in (self.path, self.work, *(os.path.join(self.path, split) for split in ("train", "val"))):
            atomic.remove_abandoned(folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of an earlier run; None for an empty folder. Raises UsageError where there are other files."""
        names = set(itertools.filterfalse(atomic.is_temporary, os.listdir(self.path)))
        if not names:
            return None
        try:
            with open(os.path.join(self.path, MANIFEST), "rb") as file:
                manifest = json.load(file)
            if not isinstance(manifest, dict) or not {"state", "settings", "splits"} <= manifest.keys():
                raise ValueError
        except FileNotFoundError:
            if names <= OWN_NAMES:
                return None
            other = printable(min(names - OWN_NAMES))
            raise UsageError(
                f"{printable(self.path)} has other files ({other}): name a new or an empty folder with --out"
            ) from None
        except (OSError, ValueError):
            raise UsageError(
                f"{printable(self.path)} has a {MANIFEST} that capcli prepare did not write: name another --out"
            ) from None
        return manifest

    def damaged_shards(self, plan: ShardPlan, manifest: Mapping[str, Any]) -> list[Shard]:
        """The shards of a finished copy that are missing or do not have the content in its manifest."""
        record = os.path.join(self.path, MANIFEST)
        return [
            shard
            for name, shards in plan.splits.items()
            for shard, entry in zip(shards, manifest["splits"][name]["shards"], strict=True)
            if not is_unchanged(self.file(shard), entry["bytes"], entry["sha256"], record)
        ]

    def damaged_descriptions(self, plan: ShardPlan, manifest: Mapping[str, Any]) -> list[str]:
        """The paths of the JSON files of a finished copy that are missing or damaged."""
        digests = manifest.get("descriptions", {})  # earlier versions did not write them
        return [
            path
            for name in descriptions(plan.splits)
            if not is_description(path := os.path.join(self.path, name), digests.get(name))
        ]

    def written_files(self, manifest: Mapping[str, Any]) -> list[str]:
        """The files that earlier runs may have written, without those in `work`; the manifest is the last."""
        shards = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
        files = [file for file in shards if SHARD_FILE.fullmatch(file)]
        files += [f"{split}/{name}" for split in dict.fromkeys(map(os.path.dirname, files)) for name in SPLIT_FILES]
        files += [*sorted(OWN_NAMES - {UNFINISHED, MANIFEST}), MANIFEST]
        return [os.path.join(self.path, file) for file in files]

    def clear(self, manifest: Mapping[str, Any]) -> None:
        """Removes the files that earlier runs wrote, the manifest last, and nothing else."""
        self.remove_unfinished()
        files = self.written_files(manifest)
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for folder in {os.path.dirname(path) for path in files} - {self.path}:
            with contextlib.suppress(OSError):  # it contains other files
                os.rmdir(folder)

    def begin(self, plan: ShardPlan, *, new: bool) -> None:
        """Makes the folders, writes the manifest of a `new` copy, and removes incomplete files."""
        if new:
            run_file.write(os.path.join(self.path, MANIFEST), plan.manifest())
            remove_files(self.work, UNFINISHED_FILE)  # that no run of this copy wrote
        os.makedirs(self.work, exist_ok=True)
        for name in plan.splits:
            os.makedirs(os.path.join(self.path, name), exist_ok=True)
        remove_files(self.work, INCOMPLETE_FILE)

    def reopen(self, plan: ShardPlan, manifest: dict[str, Any], damaged: Sequence[Shard]) -> None:
        """Turns a finished copy into an unfinished one, with a note for each shard except those that are `damaged`.

        The other shards stay readable.
        """
        os.makedirs(self.work, exist_ok=True)
        reasons = iter(self._reasons(manifest))
        for name, shards in plan.splits.items():
            for shard, entry in zip(shards, manifest["splits"][name]["shards"], strict=True):
                failed = tuple(map(int, entry["failed"].split()))
                failures = tuple(Failure(shard.images[position].name, *next(reasons)) for position in failed)
                if shard in damaged:
                    self.forget([shard])
                    continue
                values = {key: entry[key] for key in ("rows", "captions", "bytes", "sha256")}
                self._write_note(shard, WrittenShard(**values, failures=failures, failed=failed))
        self._update_manifest(manifest, {"state": "unfinished"})

    def _reasons(self, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Error and message of each failed image of a finished copy, in the order of its shards."""
        count = sum(len(shard["failed"].split()) for split in manifest["splits"].values() for shard in split["shards"])
        try:
            with open(self.failures, "rb") as file:  # the failures of images are the last of the list
                rows = [json.loads(line) for line in file][-count:] if count else []
            reasons = [(str(row["error"]), str(row["message"])) for row in rows]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            reasons = []
        unknown = [("unknown", "the list of failures is damaged: --retry-failed tries the image again")]
        return reasons if len(reasons) == count else unknown * count

    def begin_retry(self, manifest: dict[str, Any]) -> None:
        """Records that images that failed before are to be tried again, until the copy is finished."""
        self._update_manifest(manifest, {"again": True})

    def _update_manifest(self, manifest: dict[str, Any], changes: Mapping[str, Any]) -> None:
        manifest |= changes
        run_file.write(os.path.join(self.path, MANIFEST), manifest)

    def written_shard(self, shard: Shard) -> WrittenShard | None:
        """A shard's note; None where the shard is not written, or is damaged."""
        try:
            with open(self._note(shard), "rb") as file:
                written = WrittenShard.from_json(json.load(file))
            whole = is_unchanged(self.file(shard), written.bytes, written.sha256, self._note(shard))
            return written if whole else None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def file(self, shard: Shard) -> str:
        return os.path.join(self.path, shard.file)

    def _note(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.json")

    def _write_note(self, shard: Shard, written: WrittenShard) -> None:
        atomic.replace(self._note(shard), [json.dumps(written.to_json()).encode()])

    def logged(self, shard: Shard, *, retry: bool) -> frozenset[int]:
        """The positions of the images whose results the log of an unfinished shard has."""
        return logged_positions(self._log(shard), retry=retry)

    def log(self, shard: Shard, *, retry: bool) -> ShardLog:
        return ShardLog(self._log(shard), retry=retry)

    def _log(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.part")

    def _temporary(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.arrow")

    def writer(self, shard: Shard, plan: ShardPlan) -> ShardWriter:
        return ShardWriter(self._temporary(shard), features_of(odd_names=plan.odd_names, tagged=plan.tagged))

    def settle(
        self, shard: Shard, writer: ShardWriter, failures: Mapping[int, Failure], *, retried: bool
    ) -> WrittenShard:
        """Moves a written shard to its place. Its note comes first: it counts only for a file of the size it gives."""
        temporary = self._temporary(shard)
        size, failed = os.path.getsize(temporary), tuple(failures)
        digest = _digest(temporary)
        written = WrittenShard(writer.rows, writer.captions, size, digest, tuple(failures.values()), failed, retried)
        self._write_note(shard, written)
        atomic.settle(temporary, self.file(shard))
        os.unlink(self._log(shard))
        return written

    def finish(
        self,
        plan: ShardPlan,
        manifest: dict[str, Any],
        written: Mapping[Shard, WrittenShard],
        failures: Sequence[Failure],
    ) -> None:
        """Writes the failures, the files that make the shards a dataset, and the final manifest."""
        self.write_failures(failures)
        describe(
            self.path, list(self._splits(plan, written)), features_of(odd_names=plan.odd_names, tagged=plan.tagged)
        )
        for name, shards in plan.splits.items():
            split = manifest["splits"][name]
            split |= {key: sum(getattr(written[s], key) for s in shards) for key in ("rows", "captions", "bytes")}
            for entry, shard in zip(split["shards"], shards, strict=True):
                entry |= {key: getattr(written[shard], key) for key in ("rows", "captions", "bytes", "sha256")}
                entry |= {"failed": " ".join(map(str, written[shard].failed))}  # a JSON list takes a line per number
        manifest["descriptions"] = {name: _digest(os.path.join(self.path, name)) for name in descriptions(plan.splits)}
        manifest.pop("again", None)
        empty, unread = (sum(failure.error == kind for failure in failures) for kind in (EMPTY, UNREAD))
        left_out = {"images_left_out": len(failures) - empty - unread, "empty_captions": empty, "unread_rows": unread}
        self._update_manifest(manifest, {"state": "finished", **left_out})
        self.remove_unfinished()

    def _splits(self, plan: ShardPlan, written: Mapping[Shard, WrittenShard]) -> Iterator[SplitFiles]:
        for name, shards in plan.splits.items():
            digest = hashlib.sha256("".join(written[shard].sha256 for shard in shards).encode()).hexdigest()
            yield SplitFiles(name, [shard.file for shard in shards], digest)

    def write_failures(self, failures: Sequence[Failure]) -> None:
        """Writes the list of failures; without failures there is no file."""
        if failures:
            atomic.replace(self.failures, map(failure_line, failures))
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.failures)

    def remove_unfinished(self) -> None:
        remove_files(self.work, UNFINISHED_FILE)
        with contextlib.suppress(OSError):
            os.rmdir(self.work)

    def forget(self, shards: Sequence[Shard]) -> None:
        """Removes these shards and their notes, so that the next run writes them again."""
        for shard in shards:
            for path in (self._note(shard), self.file(shard)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)


def is_unchanged(path: str, size: int, sha256: str, record: str) -> bool:
    """Whether a file still has this size and content; `record` is the file that was written after it.

    A file that was not modified since then is not read.
    """
    try:
        status = os.stat(path)
        if status.st_size != size:
            return False
        return status.st_mtime_ns < os.stat(record).st_mtime_ns or _digest(path) == sha256
    except OSError:
        return False


def is_description(path: str, sha256: str | None) -> bool:
    """Whether a JSON file has this content; None where it is not known."""
    try:
        if sha256 is not None:
            return _digest(path) == sha256
        with open(path, "rb") as file:
            return isinstance(json.load(file), dict)
    except (OSError, ValueError):
        return False


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
