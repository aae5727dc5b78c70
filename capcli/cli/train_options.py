"""The Click options that only `capcli train` has: the captioner's parts, optimization, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click

from capcli.cli.click_options import SectionedOption, apply, model_or, option
from capcli.options import ModelOptions, TrainOptions
from capcli.options.train import DEFAULT_LENGTH, IMAGE_TOKENS, PREFIX_ENCODER, TAG_TOKENS

model = partial(option, ModelOptions, section="Model")
adapter = partial(option, TrainOptions, section="Model")
optimization = partial(option, TrainOptions, section="Optimization")
evaluation = partial(option, TrainOptions, section="Evaluation and checkpoints")


class PartType(click.ParamType[Any]):
    """A name or a path; in a TOML file also a table of config values."""

    name = "ID|FOLDER|CONFIG.json"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str | Mapping):
            self.fail(f"{value!r} is neither a name nor a table of config values", param, ctx)
        return value


class TaskTables(click.ParamType[Any]):
    """The [[task]] tables of a TOML file; they cannot be given on the command line."""

    name = "[[task]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, list | tuple) or not all(isinstance(table, Mapping) for table in value):
            self.fail("tasks are [[task]] tables of the file that --config names", param, ctx)
        return tuple(value)


PART_OPTIONS = (
    model(
        "--encoder",
        type=PartType(),
        help="Vision encoder: ViT, DeiT, BEiT, Swin, SwinV2; ResNet for a prefix or a T5. A .json config gets new random "
        f"weights. [default with --join prefix: {PREFIX_ENCODER}]",
    ),
    model(
        "--decoder", type=PartType(), help="Text decoder: GPT-2, BERT or T5. A .json config gets new random weights."
    ),
    model(
        "--join",
        help="How the decoder reads the image. cross: by cross-attention; prefix: as tokens before the caption (GPT-2). "
        "[default: cross]",
    ),
    model("--image-tokens", help=f"Prefix: number of tokens for the image. [default: {IMAGE_TOKENS}]"),
    model(
        "--tag-tokens",
        help=f"Prefix: maximum number of tokens read from --tags-column. [default: {TAG_TOKENS} with --tags-column]",
    ),
    model(
        "--question-encoder", type=PartType(), help="T5 decoder: another T5, whose encoder encodes the question first."
    ),
    model(
        "--model",
        metavar="ID|FOLDER",
        help="Continue from this captioner instead of an encoder and a decoder.",
        **model_or(None),
    ),
    model(
        "--tokenizer",
        metavar="new|ID|FOLDER",
        help="Tokenizer. new: a byte-level BPE trained on the captions. [default: that of the decoder]",
    ),
    model("--vocab-size", help="Maximum vocabulary of a new tokenizer."),
    model(
        "--max-length",
        help="Tokens of a caption to train on, the end token included; longer captions are truncated. "
        f"[default: {DEFAULT_LENGTH}, or the decoder's maximum if that is smaller; 256 for vision-language models]",
    ),
    adapter(
        "--lora",
        help="Train a LoRA adapter of --model instead of its weights. Vision-language models can only be trained so.",
    ),
    adapter("--lora-rank", help="Rank of the adapter's matrices."),
    adapter("--lora-alpha", help="Scale of the adapter, divided by the rank. [default: twice the rank]"),
    adapter(
        "--lora-targets",
        metavar="REGEX",
        help="Names of the linear layers to adapt. [default: those of the text decoder's attention and feed-forward layers]",
    ),
    adapter(
        "--prompt",
        help="Vision-language models: the text beside each image. {tags} stands for the text of --tags-column. "
        "[default: that of capcli caption]",
    ),
    adapter("--system", help="Vision-language models: a system message before the prompt."),
    model("--extra-tokens", help="Add N tokens to the vocabulary: <loc_0>, <loc_1>, ..."),
)
OPTIMIZATION_OPTIONS = (
    optimization("--epochs", help="Passes over the training captions."),
    optimization("--max-steps", help="Number of steps (updates of the weights), instead of --epochs."),
    optimization("--batch-size", help="Captions per device and forward pass."),
    optimization("--accumulation", help="Forward passes per step, whose gradients are accumulated."),
    optimization("--learning-rate", help="Peak learning rate."),
    optimization("--schedule", help="Learning rate schedule."),
    optimization(
        "--warmup",
        metavar="N|X",
        help="Steps of linear warmup, or below 1 a fraction of all steps.",
    ),
    optimization("--weight-decay", help="Weight decay of matrices; biases and normalization weights have none."),
    optimization("--adam-beta2", help="AdamW's beta2."),
    optimization("--max-grad-norm", help="Clip gradients to this norm; 0 is off."),
    optimization("--label-smoothing", help="Label smoothing factor."),
    optimization(
        "--dtype",
        help="Precision of the computation; weights are float32. auto: bfloat16 on GPUs that support it, otherwise float32.",
    ),
    optimization(
        "--gradient-checkpointing", help="Recompute activations in the backward pass: less memory, more time."
    ),
    optimization(
        "--freeze", help="Part that is not trained. New cross-attention layers of a frozen decoder are trained anyway."
    ),
    optimization("--unfreeze-after", help="Train the frozen part too after N steps."),
    optimization(
        "--mask-patches",
        help="Fraction of each image's patches that are masked in the encoder during training.",
    ),
    click.option("--task", cls=SectionedOption, section="Data", type=TaskTables(), hidden=True),
)
EVALUATION_OPTIONS = (
    evaluation("--evaluate-every", help="Evaluate and save after every N steps, or after each epoch."),
    evaluation("--save-every", help="Also save after every N steps or each epoch, for --resume."),
    evaluation("--keep-best", help="Number of best checkpoints to keep besides the last one."),
    evaluation("--select", help="Criterion of the best checkpoint: validation loss, or CIDEr of generated captions."),
    evaluation("--caption-images", help="Number of validation images to caption, for CIDEr."),
    evaluation("--patience", help="Stop after N evaluations without an improvement."),
    evaluation("--log-every", help="Steps per row of history.csv."),
)

part_options = partial(apply, PART_OPTIONS)
optimization_options = partial(apply, OPTIMIZATION_OPTIONS)
evaluation_options = partial(apply, EVALUATION_OPTIONS)
