"""The folder of a training run: its files, its settings, and whether a run may start or resume in it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tomllib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from capcli.errors import CapcliError, UsageError
from capcli.models import model_files
from capcli.options import DataOptions, TrainOptions, table_of
from capcli.options.train import NEW
from capcli.records import Annotated
from capcli.storage import atomic
from capcli.storage.locks import FolderLock
from capcli.text import is_text, printable
from capcli.training.output import checkpoints

SETTINGS, FACTS, CARD = "train.toml", "run.json", "README.md"
HISTORY, CURVES, EVENTS = "history.csv", "curves.png", "tensorboard"
LEFT_OUT, CHECKPOINTS = "data.failures.jsonl", "checkpoints"
REQUIRED_FACTS = {"broken", "left_out", "data", "new"}  # lists that run.json has from the start of a run
# The files that a run writes while it trains and, if run.json lists them as "left", when it ends.
EARLY = {SETTINGS, FACTS, LEFT_OUT, CHECKPOINTS, EVENTS, HISTORY, CURVES}
LATE = {CARD, *model_files.SETTINGS, *model_files.TOKENIZER, *model_files.WEIGHTS}
# The entries of its folders that a run writes; all others are the user's.
INSIDE = {CHECKPOINTS: re.compile(r"checkpoint-\d+"), EVENTS: re.compile(r"events\.out\.tfevents\..+")}
# Settings that may change on --resume, because the batches stay the same. A new last step changes the learning rates
# from there on, which is reported. Patience and the plateau schedule count the evaluations that take place.
CHANGEABLE = {
    *("out", "resume", "overwrite", "quiet", "device", "threads", "workers", "decode_timeout"),
    *("epochs", "max_steps", "log_every", "evaluate_every", "save_every", "keep_best", "select", "patience"),
}
UNSAVED = ("out", "resume", "overwrite", "quiet", "data", "model", "generation", "task")
# The number of a training process, as the launchers that accelerate knows set it.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run; a context in which no other run can write to it.

    `checkpoint` is the one to resume from, None for a new run; `passed_over` says of each newer one what is wrong with it.
    `old` are the files of an earlier run that `begin` removes.
    """

    folder: str
    checkpoint: str | None
    old: frozenset[str] = frozenset()
    passed_over: tuple[str, ...] = ()
    lock: FolderLock = field(default_factory=FolderLock)

    @classmethod
    def open(cls, options: TrainOptions) -> RunFolder:
        """Checks the folder without changing anything, and locks it if it exists.

        Raises UsageError when it contains files of the user or a run that this command neither resumes nor overwrites,
        when the settings of a resumed run differ, and when overwriting would remove what the new run reads. Raises
        CapcliError when another run is training in it, and when the run to resume has no whole checkpoint left.
        """
        run = cls(options.out, None)
        try:
            return run._opened(options)
        except BaseException:
            run.lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.release()

    def _opened(self, options: TrainOptions) -> RunFolder:
        folder = self.folder
        for path in (folder, *(path for data in sources(options) for path in (*data.data, *data.val_data))):
            if not is_text(path):
                raise UsageError(f"{printable(path)} is not UTF-8, which train.toml needs: rename or link it")
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise UsageError(f"--out {folder} is a file; name a folder")
        names = self._locked_names()
        if not self._is_run():
            if FACTS in names:
                raise UsageError(
                    f"{self.path(FACTS)} is damaged, so the training run cannot be recognised: restore the file, or name "
                    "another folder"
                )
            others = set(itertools.filterfalse(atomic.is_temporary, names)) - {CHECKPOINTS, f"{FACTS}.tmp"}
            if others or _is_filled(self.checkpoints):
                raise UsageError(f"--out {folder} is not empty and contains no training run: name another folder")
            return self
        if options.resume and (resumed := self._resumed()):
            self._refuse_other_settings(options)
            return resumed
        left = set(self.facts().get("left", ()))
        if (names & left or checkpoints.complete(self.checkpoints)) and not options.overwrite:
            problem = "it has no checkpoint to resume from" if options.resume else "--resume continues it"
            raise UsageError(f"--out {folder} contains a training run: {problem}, --overwrite deletes it")
        if foreign := names & LATE - left:
            raise UsageError(
                f"--out {folder} contains {min(foreign)}, which no training run wrote: name another folder"
            )
        old = frozenset(names & (EARLY | left))
        self._refuse_removing_inputs(options, old)
        passed_over = checkpoints.newest_whole(self.checkpoints)[1] if options.resume else ()
        return replace(self, old=old, passed_over=tuple(passed_over))

    def _locked_names(self) -> set[str]:
        """The names in the folder, after it is locked; none if it does not exist. Raises CapcliError."""
        if not os.path.isdir(self.folder):
            return set()
        with self.writing():
            self._take_lock(self.folder)
            if os.path.isdir(self.checkpoints):  # may be a link, to a folder that another run uses
                self._take_lock(self.checkpoints)
            return set(os.listdir(self.folder))

    def _take_lock(self, folder: str) -> None:
        """Locks a folder, in the first of several processes of a run only. Raises CapcliError if it is locked."""
        if next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0" and not self.lock.take(folder):
            raise CapcliError(f"another run is training in {folder}: wait for it, or name another folder with --out")

    def _resumed(self) -> RunFolder | None:
        """The run in the folder at its newest whole checkpoint; None if no checkpoint was ever completed.

        Raises UsageError for a checkpoint of another run, and CapcliError when all checkpoints are damaged.
        """
        if foreign := checkpoints.foreign(self.checkpoints, self.facts().get("run")):
            raise UsageError(f"{foreign} was written by another run: move it out of this folder")
        checkpoint, passed_over = checkpoints.newest_whole(self.checkpoints)
        if checkpoint is not None:
            return replace(self, checkpoint=checkpoint, passed_over=tuple(passed_over))
        if not (existing := checkpoints.complete(self.checkpoints)):
            return None
        weights = [path for path in existing.values() if checkpoints.find_damage(path, resumed=False) is None]
        advice = f"start another run from --model {weights[-1]}" if weights else "delete the run with --overwrite"
        raise CapcliError(
            f"the run in {self.folder} cannot be resumed: {'; '.join(passed_over)}. Restore the files, or {advice}"
        )

    def make(self) -> None:
        """Creates the folder if it does not exist, and locks it. Raises CapcliError."""
        with self.writing():
            new = not os.path.isdir(self.checkpoints)
            os.makedirs(self.checkpoints, exist_ok=True)
            if not self.lock.held:
                self._take_lock(self.folder)
                if self._is_run():
                    raise CapcliError(f"another run began in {self.folder}: name another folder with --out")
            if new:
                self._take_lock(self.checkpoints)
            atomic.remove_abandoned(self.folder)

    def begin(self, options: TrainOptions, facts: Mapping[str, Any]) -> None:
        """Writes train.toml, and for a new run run.json after removing the files of an earlier run. Raises CapcliError.

        A kill at any moment leaves a run.json, without which the folder would no longer be recognised as that of a run.
        """
        with self.writing():
            if self.checkpoint is None:
                facts = {**facts, "run": uuid.uuid4().hex}
                draft, descriptor = atomic.write(self.path(FACTS), [json.dumps(facts).encode()])
                for name in sorted(self.old - {FACTS}, key=lambda name: name != CHECKPOINTS):
                    remove(self.path(name), INSIDE.get(name))
                atomic.settle(draft, self.path(FACTS))
                os.close(descriptor)
            os.makedirs(self.checkpoints, exist_ok=True)
            atomic.replace(self.path(SETTINGS), [as_toml(options).encode()])

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def checkpoints(self) -> str:
        return self.path(CHECKPOINTS)

    def settings(self) -> dict[str, Any]:
        """The settings in train.toml by name. Raises CapcliError for a file that is missing or damaged."""
        path = self.path(SETTINGS)
        try:
            with open(path, "rb") as file:
                return flat(tomllib.load(file))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CapcliError(
                f"{printable(path)} cannot be read ({error}): give the run's options again, with --resume"
            ) from error

    def facts(self) -> dict[str, Any]:
        """The contents of run.json. Raises OSError and ValueError."""
        with open(self.path(FACTS), encoding="utf-8") as file:
            facts: dict[str, Any] = json.load(file)
        return facts

    def add_facts(self, **facts: Any) -> None:
        """Adds entries to run.json for later parts of the run. Raises CapcliError."""
        with self.writing():
            atomic.replace(self.path(FACTS), [json.dumps(self.facts() | facts).encode()])

    def _is_run(self) -> bool:
        try:
            facts: Any = self.facts()
        except (OSError, ValueError):
            return False
        return isinstance(facts, dict) and all(isinstance(facts.get(name), list) for name in REQUIRED_FACTS)

    def _refuse_other_settings(self, options: TrainOptions) -> None:
        before, now = self.settings(), flat(tomllib.loads(as_toml(options)))
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        for name in differing:
            if name not in CHANGEABLE:
                old, new = shown(before.get(name), now.get(name)), shown(now.get(name), before.get(name))
                raise UsageError(
                    f"{self.folder} was started with {name} = {old}, and now it is {new}: "
                    "keep the old value, or train into another folder"
                )

    def _refuse_removing_inputs(self, options: TrainOptions, names: frozenset[str]) -> None:
        folder, old = os.path.realpath(self.folder), {os.path.realpath(self.path(name)) for name in names}
        for name, path, is_model in inputs(options):
            real = os.path.realpath(os.path.expanduser(path))
            if {real, *parents(real)} & old or (is_model and real == folder and names & LATE):
                raise UsageError(
                    f"--{name} {path} is among the files that --overwrite would remove from --out {self.folder}: "
                    "name another folder"
                )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A context for writing to the folder: raises CapcliError when that fails, for example on a full disk."""
        try:
            yield
        except OSError as error:
            raise CapcliError(f"--out {self.folder} cannot be written: {error.strerror or error}") from error


def inputs(options: TrainOptions) -> Iterator[tuple[str, str, bool]]:
    """The options whose values may be paths that the run reads: name, value, and whether it is a model or a part of one."""
    model = options.model
    parts = {"model": model.model, "encoder": model.encoder, "decoder": model.decoder, "tokenizer": model.tokenizer}
    parts |= {"question-encoder": model.question_encoder}
    yield from ((name, value, True) for name, value in parts.items() if isinstance(value, str) and value != NEW)
    for data in sources(options):
        read = {"data": data.data, "val-data": data.val_data}
        single = {"image-root": data.image_root, "train-names": data.train_names, "val-names": data.val_names}
        for name, values in (read | {name: (value,) for name, value in single.items() if value}).items():
            yield from ((name, value, False) for value in values)


def sources(options: TrainOptions) -> list[DataOptions]:
    """The data options of a run, or of its tasks; each once, because several tasks may share them."""
    return list(dict.fromkeys(task.data for task in options.task)) or [options.data]


def parents(path: str) -> Iterator[str]:
    while (above := os.path.dirname(path)) != path:
        yield (path := above)


def remove(path: str, inside: re.Pattern[str] | None) -> None:
    """Removes a file, or the entries of a folder that match `inside` and then the folder if it is empty."""
    if os.path.islink(path) or not os.path.isdir(path):
        os.remove(path)
        return
    for name in os.listdir(path):
        if inside is not None and inside.fullmatch(name):
            entry = os.path.join(path, name)
            shutil.rmtree(entry) if os.path.isdir(entry) and not os.path.islink(entry) else os.remove(entry)
    with contextlib.suppress(OSError):  # it contains files of the user
        os.rmdir(path)


def shown(value: object, other: object) -> str:
    """A setting for an error message; of two tables only the first key that differs."""
    if not isinstance(value, Mapping):
        return repr(value)
    if not isinstance(other, Mapping):
        return f"a table of config values ({value.get('model_type')})"
    name = min(name for name in value.keys() | other.keys() if value.get(name) != other.get(name))
    return f"a table with {name} = {value.get(name)!r}"


def _is_filled(folder: str) -> bool:
    return os.path.isdir(folder) and bool(os.listdir(folder))


def digest(annotated: Sequence[Annotated]) -> str:
    """SHA-256 of the names, captions and tags of images, in their order."""
    sha = hashlib.sha256()
    for image in annotated:
        sha.update(json.dumps([image.name, image.captions, *([image.tags] if image.tags else ())]).encode())
    return sha.hexdigest()


def as_toml(options: TrainOptions) -> str:
    """All settings as a TOML file for --config."""
    import tomli_w

    sections: dict[str, Mapping[str, Any]] = {
        "data": asdict(options.data),
        "model": asdict(options.model),
        "train": {
            name: value for name, value in asdict(options).items() if name not in UNSAVED and saves(options, name)
        },
        "generation": asdict(options.generation),
    }
    tables = {name: {k: v for k, v in values.items() if v not in (None, ())} for name, values in sections.items()}
    tasks = {"task": [table_of(task) for task in options.task]} if options.task else {}
    return tomli_w.dumps({name: values for name, values in tables.items() if values} | tasks)


def saves(options: TrainOptions, name: str) -> bool:
    """Whether a setting belongs into train.toml: those of an adapter only where one is trained."""
    return options.lora or not name.startswith("lora")


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all sections by name, in their order; a list of tables, as of tasks, is one setting."""
    settings: dict[str, Any] = {}
    for name, values in sections.items():
        settings |= values if isinstance(values, Mapping) else {name: values}
    return settings
