"""The folder of a training run: what lies where, the settings it was begun with, and whether a new run may go there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from capcli.errors import CapcliError, UsageError
from capcli.models import model_files
from capcli.options import DataOptions, TrainOptions, table_of
from capcli.options.train import NEW
from capcli.records import Annotated
from capcli.storage import atomic
from capcli.text import is_text, printable
from capcli.training.output import checkpoints

SETTINGS, FACTS = "train.toml", "run.json"
LEFT_OUT, CHECKPOINTS, EVENTS = "data.failures.jsonl", "checkpoints", "tensorboard"
KNOWN = {"broken", "left_out", "data", "new"}  # what run.json of a run of capcli holds from its first moment
# What a run writes as it goes, and what it leaves when it ends: run.json says whether it did.
EARLY = {SETTINGS, FACTS, LEFT_OUT, CHECKPOINTS, EVENTS, "history.csv", "curves.png"}
LATE = {"README.md", *model_files.SETTINGS, *model_files.TOKENIZER, *model_files.WEIGHTS}
# What of a folder is a run's; the rest of it is somebody else's.
INSIDE = {CHECKPOINTS: re.compile(r"checkpoint-\d+"), EVENTS: re.compile(r"events\.out\.tfevents\..+")}
# What a run that goes on may do otherwise: the same batches come all the same. Another end (of which people are told)
# takes the learning rate another way from there on; and what goes by evaluations, a plateau or patience, goes by these.
FREE = {
    *("out", "resume", "overwrite", "quiet", "device", "threads", "workers", "decode_timeout"),
    *("epochs", "max_steps", "log_every", "evaluate_every", "save_every", "keep_best", "select", "patience"),
}
UNSAVED = ("out", "resume", "overwrite", "quiet", "data", "model", "generation", "task")


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. `checkpoint` is the one to go on from, None at the beginning; `old` is what beginning removes."""

    folder: str
    checkpoint: str | None
    old: frozenset[str] = frozenset()

    @classmethod
    def open(cls, options: TrainOptions) -> RunFolder:
        """Touches nothing. Raises UsageError when the folder holds something that this run must not touch, or a run of other
        settings, and when beginning anew would remove what the run is to read.
        """
        folder = options.out
        for path in (folder, *(path for data in sources(options) for path in (*data.data, *data.val_data))):
            if not is_text(path):
                raise UsageError(
                    f"{printable(path)} is no UTF-8, and train.toml can say nothing else: rename or link it"
                )
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise UsageError(f"--out {folder} is a file; name a folder")
        place = cls(folder, None)
        there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if not place._is_run():
            if there - {CHECKPOINTS, f"{FACTS}.tmp"} or _holds_any(place.checkpoints):
                raise UsageError(f"--out {folder} is not empty and holds no training run: name another folder")
            return place
        if options.resume and (checkpoint := checkpoints.latest(place.checkpoints)):
            place = cls(folder, checkpoint)
            place._refuse_other(options)
            return place
        left = set(place.recall().get("left", ()))
        if (there & left or checkpoints.latest(place.checkpoints)) and not options.overwrite:
            how = "it has no checkpoint to go on from" if options.resume else "--resume goes on with it"
            raise UsageError(f"--out {folder} holds a training run: {how}, --overwrite throws it away")
        if foreign := there & LATE - left:
            raise UsageError(f"--out {folder} holds {min(foreign)}, which no training run wrote: name another folder")
        place = cls(folder, None, frozenset(there & (EARLY | left)))
        place._refuse_removing(options)
        return place

    def make(self) -> None:
        """Makes the folder where there is none."""
        with self._writing():
            os.makedirs(self.checkpoints, exist_ok=True)

    def begin(self, options: TrainOptions, facts: Mapping[str, Any]) -> None:
        """Keeps the run's settings in the folder; at the beginning its facts too, in place of what an earlier run left.

        The earlier run goes when all else is well: its checkpoints first, and run.json, which says whose folder it is, never.
        """
        with self._writing():
            if self.checkpoint is None:
                draft = f"{self.path(FACTS)}.tmp"
                os.close(atomic.write(draft, [json.dumps(dict(facts)).encode()], os.O_WRONLY))
                for name in sorted(self.old - {FACTS}, key=lambda name: name != CHECKPOINTS):
                    remove(self.path(name), INSIDE.get(name))
                atomic.settle(draft, self.path(FACTS))
            os.makedirs(self.checkpoints, exist_ok=True)
            atomic.replace(self.path(SETTINGS), [as_toml(options).encode()])

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def checkpoints(self) -> str:
        return self.path(CHECKPOINTS)

    def settings(self) -> dict[str, Any]:
        """The settings in force, by name."""
        with open(self.path(SETTINGS), "rb") as file:
            return flat(tomllib.load(file))

    def remember(self, **facts: Any) -> None:
        """Keeps further facts of the run, for when it is gone on with."""
        atomic.replace(self.path(FACTS), [json.dumps(self.recall() | facts).encode()])

    def recall(self) -> dict[str, Any]:
        with open(self.path(FACTS), encoding="utf-8") as file:
            known: dict[str, Any] = json.load(file)
        return known

    def _is_run(self) -> bool:
        try:
            known: Any = self.recall()
        except (OSError, ValueError):
            return False
        return isinstance(known, dict) and known.keys() >= KNOWN

    def _refuse_other(self, options: TrainOptions) -> None:
        before, now = self.settings(), flat(tomllib.loads(as_toml(options)))
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        for name in differing:
            if name not in FREE:
                was, is_now = told(before.get(name), now.get(name)), told(now.get(name), before.get(name))
                raise UsageError(
                    f"{self.folder} was begun with {name} = {was}, and now it is {is_now}: "
                    "leave it as it was, or train into another folder"
                )

    def _refuse_removing(self, options: TrainOptions) -> None:
        folder, old = os.path.realpath(self.folder), {os.path.realpath(self.path(name)) for name in self.old}
        for name, path, captioner in inputs(options):
            real = os.path.realpath(os.path.expanduser(path))
            above = {real, *parents(real)}
            if above & old or (captioner and real == folder and self.old & LATE):
                raise UsageError(
                    f"--{name} {path} lies in what --overwrite would remove from --out {self.folder}: name another folder"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CapcliError(f"--out {self.folder} cannot be written: {error.strerror or error}") from error


def inputs(options: TrainOptions) -> Iterator[tuple[str, str, bool]]:
    """What a run reads, where that may be a path: the option, its value, and whether it is a captioner or a part of one."""
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
    """All that a run's data are read from, each once: several tasks may learn from the same."""
    return list(dict.fromkeys(task.data for task in options.task)) or [options.data]


def parents(path: str) -> Iterator[str]:
    while (above := os.path.dirname(path)) != path:
        yield (path := above)


def remove(path: str, inside: re.Pattern[str] | None) -> None:
    """Removes a file, or of a folder what `inside` names, and the folder if nothing else is in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        os.remove(path)
        return
    for name in os.listdir(path):
        if inside is not None and inside.fullmatch(name):
            each = os.path.join(path, name)
            shutil.rmtree(each) if os.path.isdir(each) and not os.path.islink(each) else os.remove(each)
    with contextlib.suppress(OSError):  # somebody else's is in it
        os.rmdir(path)


def told(value: object, other: object) -> str:
    """A setting for people; of a table what is otherwise in the other, where that is a table too."""
    if not isinstance(value, Mapping):
        return repr(value)
    if not isinstance(other, Mapping):
        return f"a table of config values ({value.get('model_type')})"
    name = min(name for name in value.keys() | other.keys() if value.get(name) != other.get(name))
    return f"a table with {name} = {value.get(name)!r}"


def _holds_any(folder: str) -> bool:
    return os.path.isdir(folder) and bool(os.listdir(folder))


def digest(annotated: Sequence[Annotated]) -> str:
    whole = hashlib.sha256()
    for each in annotated:
        whole.update(json.dumps([each.name, each.captions, *([each.tags] if each.tags else ())]).encode())
    return whole.hexdigest()


def as_toml(options: TrainOptions) -> str:
    """All settings in force, as a file for --config."""
    import tomli_w

    sections: dict[str, Mapping[str, Any]] = {
        "data": asdict(options.data),
        "model": asdict(options.model),
        "train": {name: value for name, value in asdict(options).items() if name not in UNSAVED},
        "generation": asdict(options.generation),
    }
    written = {name: {k: v for k, v in values.items() if v not in (None, ())} for name, values in sections.items()}
    tasks = {"task": [table_of(task) for task in options.task]} if options.task else {}
    return tomli_w.dumps({name: values for name, values in written.items() if values} | tasks)


def flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; tables of one name, as of tasks, are one setting."""
    tables = {name: values for name, values in sections.items() if isinstance(values, list)}
    return {k: v for name in sections.keys() - tables.keys() for k, v in sections[name].items()} | tables
