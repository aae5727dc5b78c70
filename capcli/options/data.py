"""Options that select images with captions, and the tasks of a training run that learns several things at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from capcli.errors import UsageError
from capcli.options.limits import OpenFraction, PositiveFloat, check_limits, limits_of
from capcli.text import flag

LIST_FIELDS = ("data", "val_data")
TASK_FIELDS = ("name", "kind", "weight", "question")  # keys of a [[task]] table that do not select its data
DEFAULT_TEMPLATE = "a photo of {label}"  # of a "classify" task


@dataclass(frozen=True, slots=True)
class DataOptions:
    """The annotations to read, and how their images are split into training and validation.

    `data` and `val_data` are annotation files or folders in any format of `capcli.annotations`. Their images are searched
    below `image_root`, or relative to the annotations. `train_names` and `val_names` are files with one image name per
    line. `tags_column` is the column (or key) with the tags of an image, `split_column` the column that contains train,
    val or test; formats with splits of their own (Karpathy's, imagefolders with split folders, prepared data) need none
    of these. `val_fraction` validates on that fraction of the images, drawn with `seed`. `val_limit` and `train_limit`
    keep that many images of a split (or below 1 that fraction of them), drawn with `seed`. With `label_template`, folders
    of images without annotations are read as classes: the caption of an image is the template with {label} replaced by
    the name of its folder. `text_files` states how text files beside images are read: each line as a caption (None means
    the same), or the whole file as one caption.
    """

    data: tuple[str, ...] = ()
    val_data: tuple[str, ...] = ()
    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    tags_column: str | None = None
    train_names: str | None = None
    val_names: str | None = None
    val_fraction: OpenFraction | None = None
    val_limit: PositiveFloat | None = None
    train_limit: PositiveFloat | None = None
    label_template: str | None = None
    text_files: Literal["lines", "whole"] | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        check_limits(self)
        if self.label_template is not None and "{label}" not in self.label_template:
            raise UsageError(f"--label-template is {self.label_template!r}; it must contain {{label}}")
        sources = [name for name in ("val_data", "val_names", "val_fraction") if getattr(self, name)]
        if len(sources) > 1:
            raise UsageError(f"{' and '.join(map(flag, sources))} both select validation images: give one of them")
        for name in ("val_limit", "train_limit"):
            limit = getattr(self, name)
            if limit is not None and limit > 1 and limit != int(limit):
                raise UsageError(
                    f"{flag(name)} is {limit}; it must be a number of images, or below 1 a fraction of them"
                )


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """One `[[task]]` table of a file for `capcli train --config`.

    Kind "caption": the model reads the question and learns the caption. "classify": it reads the question and learns the
    label of the image, which is the name of the image's folder, put into `data.label_template` (or the caption, where
    the data have captions). "masked": it reads a caption with masked spans and learns the tokens of the spans; such a task
    has no question. `weight` is how often the task is sampled relative to the others. `question` None is the question that
    the model uses by default.
    """

    name: str
    data: DataOptions
    kind: Literal["caption", "classify", "masked"] = "caption"
    weight: PositiveFloat = 1.0
    question: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UsageError(f"the name of a task is {self.name!r}; it must be a text")
        check_limits(self, written=lambda name: f"task {self.name}: {name}")
        if self.question is not None and (not isinstance(self.question, str) or not self.question.strip()):
            raise UsageError(f"task {self.name}: question is {self.question!r}; it must be a text")
        if self.question is not None and self.kind == "masked":
            raise UsageError(f"task {self.name}: a task of kind masked has no question: leave question out")
        if not self.data.data:
            raise UsageError(f"task {self.name}: it has nothing to train on: give data")


def task_of(table: Mapping[str, Any], seed: int) -> TaskOptions:
    """The task that a `[[task]]` table describes; its data are drawn with `seed`. Raises UsageError."""
    values = {name.replace("-", "_"): value for name, value in table.items()}
    data_fields = {field.name for field in fields(DataOptions)} - {"seed", "tags_column"}
    for name in values:
        if name not in data_fields and name not in TASK_FIELDS:
            near = difflib.get_close_matches(name, (*data_fields, *TASK_FIELDS), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"a [[task]] has the unknown key {name}{hint}")
    if "name" not in values:
        raise UsageError("a task has no name: give each [[task]] one")
    data = {name: checked_value(name, value) for name, value in values.items() if name in data_fields}
    if values.get("kind") == "classify":
        data.setdefault("label_template", DEFAULT_TEMPLATE)
    rest = {name: value for name, value in values.items() if name in TASK_FIELDS}
    return TaskOptions(data=replace(DataOptions(**data), seed=seed), **rest)


def checked_value(name: str, value: Any) -> Any:
    """The value of a task's data key as DataOptions takes it. Raises UsageError for a value of another type."""
    if name in LIST_FIELDS:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{name} of a task is {value!r}; it must be a text in quotes, or a list of them")
        return tuple(texts)
    if name not in limits_of(DataOptions) and not isinstance(value, str):
        raise UsageError(f"{name} of a task is {value!r}; it must be a text in quotes")
    return value


def table_of(task: TaskOptions) -> dict[str, Any]:
    """The `[[task]]` table that describes a task: the inverse of `task_of`, without the seed."""
    values = {name: getattr(task, name) for name in TASK_FIELDS}
    values |= {field.name: getattr(task.data, field.name) for field in fields(DataOptions) if field.name != "seed"}
    return {name: value for name, value in values.items() if value not in (None, ())}
