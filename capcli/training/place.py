"""The folder of a training run: what lies where, the settings it was begun with, and whether a new run may go there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capcli.errors import CapcliError, UsageError
from capcli.models import files
from capcli.names import is_text, printable
from capcli.options import TrainOptions
from capcli.records import Annotated
from capcli.sinks import atomic
from capcli.training import checkpoints

SETTINGS, FACTS = "train.toml", "run.json"
LEFT_OUT, CHECKPOINTS, EVENTS = "data.failures.jsonl", "checkpoints", "tensorboard"
# All that a run writes, and so all that --overwrite removes.
OURS = {SETTINGS, FACTS, LEFT_OUT, CHECKPOINTS, EVENTS, "history.csv", "curves.png", "README.md"}
OURS |= {*files.SETTINGS, *files.TOKENIZER, *files.WEIGHTS}
# What a run that goes on may do otherwise: nothing of this changes what is learnt from a batch, or which batches come.
FREE = {
    *("out", "resume", "overwrite", "quiet", "device", "threads", "workers", "max_pixels", "decode_timeout"),
    *("epochs", "max_steps", "log_every", "evaluate_every", "save_every", "keep_best", "select", "patience"),
    "caption_images",
}
UNSAVED = ("out", "resume", "overwrite", "quiet", "data", "model", "generation")


@dataclass(frozen=True)
class Place:
    """A run's folder. `checkpoint` is the one to go on from, None at the beginning."""

    folder: str
    checkpoint: str | None

    @classmethod
    def open(cls, options: TrainOptions) -> Place:
        """Raises UsageError when the folder holds something that this run must not touch, or a run of other settings."""
        folder = options.out
        for path in (folder, *options.data.data, *options.data.val_data):
            if not is_text(path):
                raise UsageError(
                    f"{printable(path)} is no UTF-8, and train.toml can say nothing else: rename or link it"
                )
        there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise UsageError(f"--out {folder} is a file; name a folder")
        begun = {SETTINGS, CHECKPOINTS} <= there
        saved = _holds_any(os.path.join(folder, CHECKPOINTS))
        started = there <= {CHECKPOINTS, f"{SETTINGS}.tmp"} and not saved  # and killed at once
        if there and not begun and not started:
            raise UsageError(f"--out {folder} is not empty and holds no training run: name another folder")
        if begun and saved and not (options.resume or options.overwrite):
            raise UsageError(
                f"--out {folder} holds a training run: --resume goes on with it, --overwrite throws it away"
            )
        place = cls(folder, checkpoints.latest(os.path.join(folder, CHECKPOINTS)) if options.resume else None)
        if place.checkpoint:
            place._refuse_other(options)
        return place

    def begin(self, options: TrainOptions) -> None:
        """Makes the folder, without what an earlier run left unless it is gone on with, and keeps the run's settings in it."""
        try:
            if self.checkpoint is None and os.path.isdir(self.folder):
                for name in OURS & set(os.listdir(self.folder)):
                    path = self.path(name)
                    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
            os.makedirs(self.checkpoints, exist_ok=True)
            atomic.replace(self.path(SETTINGS), [as_toml(options).encode()])
        except OSError as error:
            raise CapcliError(f"--out {self.folder} cannot be written: {error.strerror}") from error

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def checkpoints(self) -> str:
        return self.path(CHECKPOINTS)

    def remember(self, **facts: Any) -> None:
        """Keeps facts of the run for its other processes, and for when it is gone on with."""
        known = self.recall() if os.path.exists(self.path(FACTS)) else {}
        atomic.replace(self.path(FACTS), [json.dumps(known | facts).encode()])

    def recall(self) -> dict[str, Any]:
        with open(self.path(FACTS), encoding="utf-8") as file:
            known: dict[str, Any] = json.load(file)
        return known

    def _refuse_other(self, options: TrainOptions) -> None:
        with open(self.path(SETTINGS), "rb") as file:
            before = flat(tomllib.load(file))
        now = flat(tomllib.loads(as_toml(options)))
        differing = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        for name in differing:
            if name not in FREE:
                raise UsageError(
                    f"{self.folder} was begun with {name} = {before.get(name)!r}, and now it is {now.get(name)!r}: "
                    "leave it as it was, or train into another folder"
                )


def _holds_any(folder: str) -> bool:
    return os.path.isdir(folder) and bool(os.listdir(folder))


def digest(annotated: Sequence[Annotated]) -> str:
    whole = hashlib.sha256()
    for each in annotated:
        whole.update(json.dumps([each.name, each.captions]).encode())
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
    return tomli_w.dumps({name: values for name, values in written.items() if values})


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for values in sections.values() for name, value in values.items()}
