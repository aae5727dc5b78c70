"""The folder of a copy: what is done in it, so that a run that was killed at any instant goes on from there.

`manifest.json` is written first, and says what is going to be there; the last thing written is the same with what is. In
between, `unfinished/` holds the shard at work and, for each that is done, a note of what it holds and what it left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from capcli.errors import CapcliError, UsageError
from capcli.names import printable
from capcli.prepared.plan import Plan, Shard
from capcli.prepared.shards import ShardWriter, SplitFiles, describe, features_of
from capcli.records import Failure
from capcli.sinks import atomic, locks, receipt
from capcli.sinks.failures import failure_line

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


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is written: `failures` are its images that are not in it."""

    rows: int
    captions: int
    bytes: int
    sha256: str
    failures: tuple[Failure, ...]


class Folder:
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
        """Make the folder and lock it; CapcliError where that cannot be, or another run is at it."""
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

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raises CapcliError where a finished copy is no longer what its manifest says."""
        for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
            path = os.path.join(self.path, shard["file"])
            if not os.path.isfile(path) or os.path.getsize(path) != shard["bytes"]:
                raise CapcliError(f"{printable(path)} is not as it was written, or gone: --overwrite makes all anew")

    def clear(self, manifest: Mapping[str, Any]) -> None:
        """Remove what an earlier run wrote: its own files, the manifest last, and nothing else."""
        for split in manifest["splits"]:
            shutil.rmtree(os.path.join(self.path, os.path.basename(split)), ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)
        for name in (*sorted(OURS - {UNFINISHED, MANIFEST}), MANIFEST):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.path, name))

    def begin(self, plan: Plan, *, anew: bool) -> None:
        """Write down what is going to be there, and make room for it; what a kill left half done goes."""
        if anew:
            receipt.write(os.path.join(self.path, MANIFEST), plan.manifest())
        os.makedirs(self.work, exist_ok=True)
        for name in plan.splits:
            os.makedirs(os.path.join(self.path, name), exist_ok=True)
        for name in os.listdir(self.work):
            if name.endswith((".arrow", ".tmp")):
                os.unlink(os.path.join(self.work, name))

    def done(self, shard: Shard) -> Done | None:
        """What is known of a shard that is written, by its note; None where it is still to be done."""
        try:
            with open(self._note(shard), "rb") as file:
                note = json.load(file)
            failures = tuple(Failure(**failure) for failure in note.pop("failures"))
            done = Done(**note, failures=failures)
            return done if os.path.getsize(os.path.join(self.path, shard.file)) == done.bytes else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _note(self, shard: Shard) -> str:
        return os.path.join(self.work, f"{shard.label}.json")

    def writer(self, shard: Shard, plan: Plan) -> ShardWriter:
        return ShardWriter(os.path.join(self.work, f"{shard.label}.arrow"), features_of(odd_names=plan.odd_names))

    def settle(self, shard: Shard, writer: ShardWriter, failures: Sequence[Failure]) -> Done:
        """Put a shard that is written where it belongs, and then its note."""
        temporary = os.path.join(self.work, f"{shard.label}.arrow")
        with open(temporary, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        done = Done(writer.rows, writer.captions, os.path.getsize(temporary), digest, tuple(failures))
        atomic.settle(temporary, os.path.join(self.path, shard.file))
        atomic.replace(self._note(shard), [json.dumps(asdict(done)).encode()])
        return done

    def finish(
        self, plan: Plan, manifest: dict[str, Any], done: Mapping[Shard, Done], failures: Sequence[Failure]
    ) -> None:
        """Make the copy whole: what was left out, what `datasets` wants, and the manifest of what is there."""
        self.write_failures(failures)
        splits = []
        for name, shards in plan.splits.items():
            found = [done[shard] for shard in shards]
            held = manifest["splits"][name]
            held |= {key: sum(getattr(each, key) for each in found) for key in ("rows", "captions", "bytes")}
            for entry, each in zip(held["shards"], found, strict=True):
                entry |= {"rows": each.rows, "bytes": each.bytes, "sha256": each.sha256}
            digest = hashlib.sha256("".join(each.sha256 for each in found).encode()).hexdigest()
            splits.append(SplitFiles(name, [shard.file for shard in shards], digest))
        describe(self.path, splits, features_of(odd_names=plan.odd_names))
        manifest |= {"state": "finished", "failures": len(failures)}
        receipt.write(os.path.join(self.path, MANIFEST), manifest)
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
        shutil.rmtree(self.work, ignore_errors=True)

    def forget(self, shards: Sequence[Shard]) -> None:
        """These are to be done again by the next run."""
        for shard in shards:
            for path in (self._note(shard), os.path.join(self.path, shard.file)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
