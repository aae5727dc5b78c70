"""The checkpoints of a run: which are whole, which are the best, which to resume from, which to delete.

The last file of a checkpoint is its manifest, with the size and the SHA-256 of every other file: a checkpoint is whole, or it
is passed over. Checkpoints of earlier versions have a manifest without files; theirs are checked for their format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from capcli.models.model_files import CONFIG
from capcli.storage import atomic

MANIFEST = "capcli.json"
STATE = "trainer_state.json"
WEIGHTS = re.compile(r"model.*\.safetensors")
NAME = re.compile(r"checkpoint-(\d+)")
# Files that only a resumed run reads: the best checkpoints are kept without them.
TRAINING_STATE = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state(_\d+)?\.pth")
Select = Literal["loss", "cider"]
Rank = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The size in bytes and the SHA-256 of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str) -> Self:
        """Those of a file, after it is synced to disk. Raises OSError."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(file.tell(), digest)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a checkpoint.

    `processes` is the number of training processes, `since` the step of the last report before the checkpoint, `losses` the
    loss of each process summed since then, `run` the run in whose run.json it is (None: begun by an earlier version), and
    `files` all other files, None in checkpoints of earlier versions.
    """

    step: int
    processes: int
    since: int
    losses: tuple[float, ...]
    run: str | None = None
    files: Mapping[str, StoredFile] | None = None

    @classmethod
    def read(cls, checkpoint: str) -> Self:
        """Raises OSError, and ValueError, TypeError or KeyError for a file that is damaged."""
        with open(os.path.join(checkpoint, MANIFEST), encoding="utf-8") as file:
            values = json.load(file)
        report, files = values["report"], values.get("files")
        return cls(
            int(values["step"]),
            int(values["processes"]),
            int(report["since"]),
            tuple(map(float, report["loss"])),
            values.get("run"),
            None if files is None else {name: StoredFile(**file) for name, file in dict(files).items()},
        )

    def write(self, checkpoint: str) -> None:
        """Syncs the files of a checkpoint and writes its manifest, which makes it complete. Raises OSError."""
        names = sorted(set(os.listdir(checkpoint)) - {MANIFEST})
        files = {name: asdict(StoredFile.of(os.path.join(checkpoint, name))) for name in names}
        atomic.sync_folder(checkpoint)
        report = {"since": self.since, "loss": self.losses}
        values = {"step": self.step, "processes": self.processes, "run": self.run, "report": report, "files": files}
        atomic.replace(os.path.join(checkpoint, MANIFEST), [json.dumps(values).encode()])
        atomic.sync_folder(os.path.dirname(checkpoint))


def find(folder: str) -> dict[int, str]:
    """The paths of all checkpoints in `folder` by step, in the order of steps, complete or not."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = {int(match[1]): os.path.join(folder, name) for name in names if (match := NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def complete(folder: str) -> dict[int, str]:
    """Those of `find` that have a manifest; the other files are not checked."""
    return {step: path for step, path in find(folder).items() if os.path.exists(os.path.join(path, MANIFEST))}


def foreign(folder: str, run: str | None) -> str | None:
    """The path of a checkpoint in `folder` that another run wrote, None where there is none."""
    for path in complete(folder).values():
        try:
            if Manifest.read(path).run != run:
                return path
        except (OSError, ValueError, TypeError, KeyError):  # damaged, which `damage` finds
            continue
    return None


def newest_whole(folder: str) -> tuple[str | None, list[str]]:
    """The newest checkpoint that a run can resume from, and for each newer one its name and what is wrong with it."""
    passed_over: list[str] = []
    for path in reversed(find(folder).values()):
        damage = find_damage(path, resumed=True)
        if damage is None:
            return path, passed_over
        passed_over.append(f"{os.path.basename(path)}: {damage}")
    return None, passed_over


def find_damage(checkpoint: str, *, resumed: bool) -> str | None:
    """What is wrong with a checkpoint, None if it is whole; only if `resumed` with the state of the training."""
    try:
        manifest = Manifest.read(checkpoint)
    except FileNotFoundError:
        return f"it was not written completely ({MANIFEST}, its last file, is missing)"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    step = NAME.fullmatch(os.path.basename(checkpoint))
    if step is not None and int(step[1]) != manifest.step:
        return f"it is that of step {manifest.step}"
    if manifest.files is None:
        return _format_damage(checkpoint, manifest, resumed=resumed)
    files = {name: file for name, file in manifest.files.items() if resumed or not TRAINING_STATE.fullmatch(name)}
    state = [name for name in files if TRAINING_STATE.fullmatch(name)]
    if state and not any(os.path.exists(os.path.join(checkpoint, name)) for name in state):
        return "it was kept for its weights, without the state of the training"
    return _first(_size_damage, checkpoint, files) or _first(_content_damage, checkpoint, files)


def _first(
    damage: Callable[[str, StoredFile], str | None], checkpoint: str, files: Mapping[str, StoredFile]
) -> str | None:
    for name, file in files.items():
        if found := damage(os.path.join(checkpoint, name), file):
            return f"{name} {found}"
    return None


def _size_damage(path: str, file: StoredFile) -> str | None:
    if not os.path.isfile(path):
        return "is missing"
    size = os.path.getsize(path)
    return None if size == file.bytes else f"is damaged ({size:,} of {file.bytes:,} bytes)"


def _content_damage(path: str, file: StoredFile) -> str | None:
    try:
        with open(path, "rb") as stream:
            whole = hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if whole else "is damaged (its content has changed)"


def _format_damage(checkpoint: str, manifest: Manifest, *, resumed: bool) -> str | None:
    """What is wrong with a checkpoint of an earlier version, as far as the formats of its files show."""
    names = os.listdir(checkpoint)
    needed = {
        CONFIG: _is_object,
        STATE: _is_state,
        **{name: _is_safetensors for name in names if WEIGHTS.fullmatch(name)},
    }
    if len(needed) == 2:
        return "its weights are missing"
    if resumed:
        processes = range(manifest.processes)
        random = [f"rng_state_{n}.pth" for n in processes] if len(processes) > 1 else ["rng_state.pth"]
        needed |= dict.fromkeys(("optimizer.pt", "scheduler.pt", *random), _is_archive)
    for name, is_whole in needed.items():
        if name not in names:
            return f"{name} is missing"
        if not is_whole(os.path.join(checkpoint, name)):
            return f"{name} is {'damaged' if os.path.getsize(os.path.join(checkpoint, name)) else 'empty'}"
    return None


def _is_archive(path: str) -> bool:
    """Whether a file is a whole archive of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _is_safetensors(path: str) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _is_object(path: str) -> bool:
    return isinstance(_parsed(path), dict)


def _is_state(path: str) -> bool:
    state = _parsed(path)
    log = state.get("log_history") if isinstance(state, dict) else None
    return (
        isinstance(log, list)
        and isinstance(state.get("global_step"), int)
        and all(isinstance(entry, dict) and {"step", "epoch"} <= entry.keys() for entry in log)
    )


def _parsed(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError, RecursionError):
        return None


def ranking(log: Iterable[Mapping[str, Any]], select: Select) -> list[tuple[int, Rank]]:
    """The steps of the evaluations in a Trainer's log, in its order, each with its rank: higher is better.

    Of equal CIDEr the lower validation loss is better; of equal ranks the earlier step is the best.
    """
    key = "eval_loss" if select == "loss" else "eval_CIDEr"
    return [(entry["step"], _rank(entry, select)) for entry in log if key in entry]


def _rank(entry: Mapping[str, Any], select: Select) -> Rank:
    rank = (-entry["eval_loss"],) if select == "loss" else (entry["eval_CIDEr"], -entry["eval_loss"])
    return tuple(-math.inf if math.isnan(value) else value for value in rank)


def best(folder: str, ranked: Iterable[tuple[int, Rank]], count: int) -> list[int]:
    """The steps of the `count` best complete checkpoints in `folder`, the best first."""
    existing = complete(folder)
    by_rank = sorted(sorted(ranked), key=lambda item: item[1], reverse=True)  # stable: the earlier step first
    return [step for step, _ in by_rank if step in existing][:count]


def prune(folder: str, last: int, keep: Sequence[int]) -> None:
    """Deletes all checkpoints but `last` and those of the steps in `keep`, of which the training state is deleted.

    Raises OSError.
    """
    existing = complete(folder)
    for step, path in find(folder).items():
        if step == last:
            continue
        if step not in keep or step not in existing:
            shutil.rmtree(path)
            continue
        for file in os.listdir(path):
            if TRAINING_STATE.fullmatch(file):
                os.remove(os.path.join(path, file))
