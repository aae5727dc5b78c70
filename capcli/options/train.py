"""Options of `capcli train`: the captioner to train, and how it is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from capcli.errors import UsageError
from capcli.options.caption import DECODE_TIMEOUT, MAX_PIXELS, GenerationOptions
from capcli.options.data import LIST_FIELDS, DataOptions, TaskOptions
from capcli.options.limits import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check_limits,
)
from capcli.text import flag

NEW = "new"  # the tokenizer that is trained on the captions
IMAGE_TOKENS = 10  # tokens of a prefix that represent the image
TAG_TOKENS = 16  # most tokens of tags in a prefix, where images have tags
PREFIX_ENCODER = "microsoft/resnet-101"
DEFAULT_LENGTH = 50  # tokens of a caption
LORA_RANK = 16
PARTS = ("encoder", "decoder", "question_encoder")
SMALLEST_VOCABULARY = 259  # every byte, start, end and padding
SEEDS = Range(0, 2**32, max_open=True)

Part = str | Mapping[str, Any]  # a name on the hub, a path, or a table of config values
Every = PositiveInt | Literal["epoch"]
Schedule = Literal[
    "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "reduce_lr_on_plateau"
]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The captioner to train.

    `model` is an existing captioner to continue from, a folder or a name on the hub, with its own tokenizer. Without it,
    `encoder` and `decoder` are each a name on the hub or a folder with weights, or the path of a .json file of config
    values, or a table of config values with a "model_type"; the last two get new random weights. `tokenizer` None is the
    decoder's own, "new" a byte-level BPE of at most `vocab_size` tokens trained on the captions, any other value a name
    or a folder. `max_length` is the number of tokens of a caption to train on, the end token included; None is
    DEFAULT_LENGTH, or the length of the decoder where that is smaller.

    `join` states how the decoder reads the image: "cross" by cross-attention; "prefix" as `image_tokens` tokens before the
    caption (None: IMAGE_TOKENS), followed by at most `tag_tokens` tokens of tags. None is "cross". The default encoder
    of a prefix is PREFIX_ENCODER. `question_encoder` is a T5 whose encoder encodes the question for the decoder, also a
    T5. `extra_tokens` adds that many tokens to the vocabulary: <loc_0>, <loc_1> and so on.
    """

    model: str | None = None
    encoder: Part | None = None
    decoder: Part | None = None
    tokenizer: str | None = None
    vocab_size: Annotated[int, Range(SMALLEST_VOCABULARY)] = 15000
    max_length: Annotated[int, Range(2)] | None = None
    join: Literal["cross", "prefix"] | None = None
    image_tokens: PositiveInt | None = None
    tag_tokens: NonNegativeInt | None = None
    question_encoder: Part | None = None
    extra_tokens: NonNegativeInt = 0

    def __post_init__(self) -> None:
        names = (*PARTS, "tokenizer", "join", "image_tokens", "tag_tokens")
        parts = [name for name in names if getattr(self, name) is not None]
        if self.model is not None and parts:
            raise UsageError(
                f"--model is a complete captioner and cannot be combined with {' and '.join(map(flag, parts))}: "
                "give either --model, or --encoder and --decoder"
            )
        for name in ("model", *PARTS, "tokenizer"):
            if getattr(self, name) == "":
                raise UsageError(f"{flag(name)} is empty; it must name a folder or a model on the hub")
        check_limits(self)
        if self.join != "prefix" and (prefix_only := [name for name in parts if name.endswith("_tokens")]):
            raise UsageError(f"{flag(prefix_only[0])} is an option of a prefix: give --join prefix too")
        if self.join == "prefix" and self.encoder is None:
            object.__setattr__(self, "encoder", PREFIX_ENCODER)
        if self.model is None and (self.encoder is None or self.decoder is None):
            lacks = " and ".join(flag(name) for name in ("encoder", "decoder") if getattr(self, name) is None)
            raise UsageError(f"{lacks} missing: give --encoder and --decoder, or --model, a captioner to continue from")
        if self.model is not None and self.extra_tokens:
            raise UsageError(
                "--extra-tokens is an option of a new captioner: give --encoder and --decoder, not --model"
            )


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of one `capcli train`. Batch sizes are per device; a step is one update of the weights.

    `max_steps` takes precedence over `epochs`. `warmup` is a number of steps, or below 1 a fraction of all steps.
    `evaluate_every` and `save_every` are numbers of steps or "epoch"; `save_every` None saves after each evaluation.
    `select` is the criterion by which the `keep_best` best checkpoints are kept: the validation loss, or CIDEr of captions
    generated for `caption_images` validation images. `patience` stops the run after that many evaluations without an
    improvement. `unfreeze_after` is the number of steps after which the part that `freeze` names is trained too.
    `mask_patches` is the fraction of the patches of an image that are masked in the encoder during training. `task` lists
    several tasks to learn at once, each with its own data, in place of `data`.

    With `lora` an adapter of rank `lora_rank` is trained in place of the weights, for the linear layers whose names match the
    regular expression `lora_targets` (None: those of the text decoder); `lora_alpha` None is twice the rank. `prompt` and
    `system` are what a vision-language model reads beside the image; `{tags}` in the prompt stands for the image's tags.
    """

    data: DataOptions
    model: ModelOptions
    out: str
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    accumulation: PositiveInt = 1
    learning_rate: PositiveFloat = 5e-5
    schedule: Schedule = "linear"
    warmup: NonNegativeFloat = 0.0
    weight_decay: NonNegativeFloat = 0.01
    adam_beta2: Fraction = 0.999
    max_grad_norm: NonNegativeFloat = 1.0
    label_smoothing: Fraction = 0.0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    freeze: Literal["encoder", "decoder", "none"] = "none"
    unfreeze_after: PositiveInt | None = None
    mask_patches: Fraction = 0.0
    task: tuple[TaskOptions, ...] = ()
    lora: bool = False
    lora_rank: PositiveInt = LORA_RANK
    lora_alpha: PositiveFloat | None = None
    lora_targets: str | None = None
    prompt: str | None = None
    system: str | None = None
    evaluate_every: Every = "epoch"
    save_every: Every | None = None
    log_every: PositiveInt = 10
    keep_best: PositiveInt = 1
    select: Literal["loss", "cider"] = "loss"
    caption_images: NonNegativeInt = 1000
    patience: PositiveInt | None = None
    resume: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu"] = "auto"
    threads: PositiveInt | None = None
    workers: NonNegativeInt | None = None
    max_pixels: PositiveInt = MAX_PIXELS
    decode_timeout: PositiveFloat = DECODE_TIMEOUT
    quiet: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        if self.data.seed not in SEEDS:  # the random generators of training take no other seeds
            raise UsageError(f"--seed is {self.data.seed}; it must be a whole number{SEEDS}")
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise UsageError(f"--warmup is {self.warmup}; it must be a number of steps, or below 1 a fraction of them")
        if self.unfreeze_after is not None and self.freeze == "none":
            raise UsageError("--unfreeze-after has nothing to unfreeze: name a part with --freeze")
        if self.resume and self.overwrite:
            raise UsageError("--resume continues a run and --overwrite deletes it: give one of them")
        if self.select == "cider" and not self.caption_images:
            raise UsageError("--select cider needs generated captions: leave --caption-images 0 out")
        check_data(self.data, self.task)
        if self.select == "cider" and self.task and all(task.kind != "caption" for task in self.task):
            raise UsageError("--select cider needs a task of kind caption: give --select loss")
        check_lora(self)
        if self.data.tags_column is not None and self.model.model is None and self.model.join != "prefix":
            raise UsageError("--tags-column names tags that are read in a prefix: give --join prefix too")
        if self.data.tags_column is None and self.model.tag_tokens:
            raise UsageError("--tag-tokens reserves tokens for tags: name the column of tags, give --tags-column")


def check_lora(options: TrainOptions) -> None:
    """Raises UsageError for options that need an adapter, or that do not go with one."""
    if not options.lora:
        alone = {"lora_rank": options.lora_rank != LORA_RANK, "lora_alpha": options.lora_alpha is not None}
        alone |= {"lora_targets": options.lora_targets is not None}
        if given := [name for name, is_given in alone.items() if is_given]:
            raise UsageError(f"{flag(given[0])} has no effect without --lora")
        return
    if options.model.model is None:
        raise UsageError("--lora adapts an existing model: give --model")
    if options.task:
        raise UsageError("--lora learns a single task: give --data, not [[task]] tables")
    if options.freeze != "none":
        raise UsageError(f"--lora freezes the weights of the model: leave --freeze {options.freeze} out")
    if any(getattr(options.generation, each.name) is not None for each in fields(options.generation)):
        raise UsageError("an adapter stores no generation settings: leave them out, and give them to capcli caption")
    if options.lora_targets is not None:
        try:
            re.compile(options.lora_targets)
        except re.error as error:
            raise UsageError(f"--lora-targets is no regular expression: {error}") from None


def check_data(data: DataOptions, tasks: tuple[TaskOptions, ...]) -> None:
    """Raises UsageError where there is nothing to train on, or where tasks conflict with other options or each other."""
    if not data.data and not tasks:
        raise UsageError("nothing to train on: give --data")
    if tasks and (data.data or data.val_data):
        raise UsageError("each task names its own data: leave --data and --val-data out")
    given = [each.name for each in fields(data) if each.name != "seed" and getattr(data, each.name) is not None]
    if tasks and (of_run := [name for name in given if name not in LIST_FIELDS]):
        advice = "tasks read no tags: leave it out" if of_run[0] == "tags_column" else "put it into the [[task]] tables"
        raise UsageError(f"{flag(of_run[0])} is given for the whole run, but each task has its own data: {advice}")
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError("two tasks have the same name: give each a different one")
