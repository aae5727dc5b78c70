"""What a run that learns several things at once learns: one task each, a text in and a text out."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from capcli.errors import UsageError
from capcli.options.data import DataOptions

Kind = Literal["caption", "classify", "masked"]
TEMPLATE = "a photo of {label}"
OWN = ("name", "kind", "weight", "question")  # what of a task's table is not about its data
LISTS = ("data", "val_data")
NUMBERS = ("val_fraction", "val_limit", "train_limit")


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """One `[[task]]` of a file for `capcli train --config`.

    "caption": the question in, a caption out. "classify": the question in, the label of the image out, which is the name of
    the folder that it is in, put into `data.label_template` (or, in annotations, its caption). "masked": a caption in whose
    words have gaps, and out come the words for them; it asks no question.
    `weight` is how often it is learnt beside the others. `question` None is the one that the model is asked by itself.
    """

    name: str
    data: DataOptions
    kind: Kind = "caption"
    weight: float = 1.0
    question: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise UsageError(f"a task's name is {self.name!r}; it must be a text")
        where = f"task {self.name}"
        if self.kind not in get_args(Kind):
            raise UsageError(f"{where}: kind is {self.kind!r}; it must be {', '.join(get_args(Kind))}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UsageError(f"{where}: weight is {weight!r}; it must be a number above 0")
        if self.question is not None and (not isinstance(self.question, str) or not self.question.strip()):
            raise UsageError(f"{where}: question is {self.question!r}; it must be a text")
        if self.question is not None and self.kind == "masked":
            raise UsageError(f"{where}: masked captions are asked about themselves: leave question out")
        if not self.data.data:
            raise UsageError(f"{where}: nothing to train on: give data")


def task_of(table: Mapping[str, Any], seed: int) -> TaskOptions:
    """A task from its table; its data are drawn with the run's seed. Raises UsageError."""
    values = {name.replace("-", "_"): value for name, value in table.items()}
    about_data = {field.name for field in fields(DataOptions)} - {"seed", "tags_column"}
    for name in values:
        if name not in about_data and name not in OWN:
            near = difflib.get_close_matches(name, (*about_data, *OWN), 1)
            raise UsageError(f"a task has {name}, which none has{f'; did you mean {near[0]}?' if near else ''}")
    if "name" not in values:
        raise UsageError("a task has no name: give each [[task]] one")
    given = {name: value for name, value in values.items() if name in about_data}
    for name, value in given.items():
        given[name] = typed(name, value)
    if values.get("kind") == "classify":
        given.setdefault("label_template", TEMPLATE)
    data = replace(DataOptions(**given), seed=seed)
    return TaskOptions(data=data, **{name: value for name, value in values.items() if name in OWN})


def typed(name: str, value: Any) -> Any:
    """A value of a task's data as DataOptions has it. Raises UsageError for one of another kind."""
    if name in LISTS:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise UsageError(f"a task's {name} is {value!r}; it must be a text in quotes, or a list of them")
        return tuple(values)
    kinds, words = ((int, float), "a number") if name in NUMBERS else ((str,), "a text in quotes")
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UsageError(f"a task's {name} is {value!r}; it must be {words}")
    return value


def table_of(task: TaskOptions) -> dict[str, Any]:
    """The table that a task is of."""
    values = {name: getattr(task, name) for name in OWN}
    values |= {field.name: getattr(task.data, field.name) for field in fields(DataOptions) if field.name != "seed"}
    return {name: value for name, value in values.items() if value not in (None, ())}
