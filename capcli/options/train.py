"""What `capcli train` was asked to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

from capcli.errors import UsageError
from capcli.options.caption import DECODE_TIMEOUT, MAX_PIXELS, GenerationOptions
from capcli.options.data import DataOptions
from capcli.options.task import LISTS, TaskOptions
from capcli.options.training_model import ModelOptions
from capcli.text import flag

Every = int | Literal["epoch"]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "reduce_lr_on_plateau"
]


# What a number must be, where a comparison alone would let through what is no number.
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(("epochs", "learning_rate", "decode_timeout"), (lambda x: x > 0, "above 0")),
    **dict.fromkeys(("warmup", "weight_decay", "max_grad_norm"), (lambda x: x >= 0, "0 or more")),
    **dict.fromkeys(
        ("adam_beta2", "label_smoothing", "mask_patches"), (lambda x: 0 <= x < 1, "0 or more, and below 1")
    ),
    "seed": (lambda x: 0 <= x < 2**32, "from 0 to 2**32 - 1"),
}


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """One `capcli train`. Batch sizes are per device; a step is one update of the weights.

    `max_steps` wins over `epochs`. `warmup` is a number of steps, or below 1 a share of them. Raises UsageError for a number
    that is none, or out of its range. `evaluate_every` and
    `save_every` count steps, or say "epoch"; None saves whenever there was an evaluation. `select` says by what the
    `keep_best` checkpoints are chosen: the validation loss, or CIDEr of captions generated for `caption_images` of the
    validation images. `patience` ends the run after so many evaluations without a better one. `unfreeze_after`
    counts steps until what `freeze` holds still learns too. `mask_patches` is the share of an image's patches that are hidden
    from the encoder while it learns. `task` are several things to learn at once, each from its own data, in place of `data`.
    """

    data: DataOptions
    model: ModelOptions
    out: str
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 5e-5
    schedule: Schedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    freeze: Literal["encoder", "decoder", "none"] = "none"
    unfreeze_after: int | None = None
    mask_patches: float = 0.0
    task: tuple[TaskOptions, ...] = ()
    evaluate_every: Every = "epoch"
    save_every: Every | None = None
    log_every: int = 10
    keep_best: int = 1
    select: Literal["loss", "cider"] = "loss"
    caption_images: int = 1000
    patience: int | None = None
    resume: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = None
    workers: int | None = None
    max_pixels: int = MAX_PIXELS
    decode_timeout: float = DECODE_TIMEOUT
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.unfreeze_after is not None and self.freeze == "none":
            raise UsageError("--unfreeze-after has nothing to unfreeze: say what with --freeze")
        if self.resume and self.overwrite:
            raise UsageError("--resume goes on with a run and --overwrite throws it away: give one of them")
        if self.select == "cider" and not self.caption_images:
            raise UsageError("--select is cider, of captions, and --caption-images is 0: no captions would be made")
        refuse_data(self.data, self.task)
        if self.select == "cider" and self.task and all(task.kind != "caption" for task in self.task):
            raise UsageError("--select is cider, of captions, and no task is to caption: select by loss")
        for name, (allowed, words) in NUMBERS.items():
            value = self.data.seed if name == "seed" else getattr(self, name)
            if not (math.isfinite(value) and allowed(value)):
                raise UsageError(f"{flag(name)} is {value}; it must be {words}")
        if self.data.tags_column is not None and self.model.model is None and self.model.join != "prefix":
            raise UsageError("--tags-column names words that stand between image and caption: give --join prefix too")
        if self.data.tags_column is None and self.model.tag_tokens:
            raise UsageError("--tag-tokens is room for words on an image: give --tags-column, which holds them")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise UsageError(f"--warmup is {self.warmup}; it must be whole steps, or below 1 a share of them")


def refuse_data(data: DataOptions, tasks: tuple[TaskOptions, ...]) -> None:
    """Raises UsageError for nothing to train on, and for tasks that do not go together."""
    if not data.data and not tasks:
        raise UsageError("nothing to train on: give --data")
    if tasks and (data.data or data.val_data):
        raise UsageError("tasks name their data themselves, each its own: leave --data and --val-data out")
    whole = [each.name for each in fields(data) if each.name != "seed" and getattr(data, each.name) is not None]
    if tasks and (beside := [name for name in whole if name not in LISTS]):
        where = (
            "tasks read no tags: leave it out" if beside[0] == "tags_column" else "put it into each [[task]] it is of"
        )
        raise UsageError(
            f"{flag(beside[0])} is given for the whole run, and tasks read their data each its own way: {where}"
        )
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError("two tasks have one name: give each its own")
