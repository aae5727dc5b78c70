"""`capcli train`: parses the command line and the config file into TrainOptions and runs the training."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from capcli.cli.click_options import (
    SectionedCommand,
    debug_option,
    do_without_broken,
    fields_from,
    import_extra,
    option,
)
from capcli.cli.config_file import config_option, read_toml, settings_for
from capcli.cli.shared_options import (
    data_from,
    data_options,
    generation_from,
    generation_options,
    image_limits,
    quiet_option,
    workers_option,
)
from capcli.cli.train_options import evaluation_options, optimization_options, part_options
from capcli.errors import UsageError
from capcli.imports import UNUSED_BY_TRAINING
from capcli.options import ModelOptions, TrainOptions, task_of
from capcli.options.train import PARTS

SETTINGS = "train.toml"  # file of a run's settings in its folder

output = partial(option, TrainOptions, section="Output")
execution = partial(option, TrainOptions, section="Execution")

# Options on the command line or in the environment, and the options of a file that each of them overrides.
DISCARDED_BY = {
    "model": (*PARTS, "tokenizer", "join", "image_tokens", "tag_tokens", "extra_tokens"),
    "encoder": ("model",),
    "decoder": ("model",),
    "epochs": ("max_steps",),
}


class TrainCommand(SectionedCommand):
    """With --resume, the settings of the run in --out are the defaults. Options given by the user override conflicting ones
    of a file.
    """

    distributed = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        arguments = list(args)
        rest = super().parse_args(ctx, args)
        saved = os.path.join(ctx.params.get("out") or "", SETTINGS)
        if ctx.params.get("resume") and ctx.params.get("out") and os.path.exists(saved):
            settings = settings_for(str(self.name), read_toml(saved), saved)
            ctx.default_map = {**settings, **(ctx.default_map or {})}
            ctx.params = {}
            rest = super().parse_args(ctx, arguments)
        for name, others in DISCARDED_BY.items():
            if ctx.params.get(name) is not None and not is_default(ctx, name):
                for other in others:
                    if is_default(ctx, other):
                        ctx.params[other] = 0 if other == "extra_tokens" else None
        default_model = ctx.get_parameter_source("model") == ParameterSource.DEFAULT  # of CAPCLI_MODEL
        if default_model and any(ctx.params[part] is not None for part in ("encoder", "decoder")):
            ctx.params["model"] = None
        return rest


def is_default(ctx: click.Context, name: str) -> bool:
    """Whether the value of a parameter comes from a file or is the option's own default."""
    return ctx.get_parameter_source(name) in (ParameterSource.DEFAULT_MAP, ParameterSource.DEFAULT)


@click.command(cls=TrainCommand, short_help="Train a captioner on images with captions.")
@data_options
@part_options
@optimization_options
@evaluation_options
@generation_options
@output("-o", "--out", metavar="FOLDER", type=click.Path(), help="Folder of the captioner and its checkpoints.")
@output("--resume", help="Resume the run in --out, if there is one, with its settings.")
@output("--overwrite", help="Delete the run in --out and start from scratch.")
@execution("--device", help="Device of the training. CUDA_VISIBLE_DEVICES selects a GPU.")
@execution("--threads", help="CPU threads of the model. [default: all cores]")
@workers_option(TrainOptions, help="Processes that load images. 0: the main process.")
@image_limits(TrainOptions, section="Execution")
@config_option()
@quiet_option("Print nothing but errors.")
@debug_option
def train(**given: Any) -> int:
    """Train a captioner: a new one from an encoder and a decoder, or an existing one.

    \b
      capcli train --encoder google/vit-base-patch16-224 --decoder gpt2 \\
        --data captions.txt --val-fraction 0.05 --out my-captioner
      capcli caption ./photos --model my-captioner

    The output folder is a transformers model: the best checkpoint by --select, with its history, curves and model card.
    Generation options become the captioner's default settings.

    With a T5 decoder, the file for --config may contain several tasks, each a [[task]] table with name, data, kind
    (caption, classify or masked), weight and question.

    Ctrl-C saves a checkpoint and exits; the same command with --resume continues with the next batch. On several GPUs:
    torchrun --nproc-per-node gpu -m capcli train.

    \b
    Exit codes:
      0         trained
      1         the run failed
      2         wrong usage
      130, 143  interrupted; --resume continues the run
    """
    options = train_options(given)
    from capcli.training.output.folder import RunFolder

    with RunFolder.open(options) as folder:  # may raise an error, before torch is loaded
        if options.unfreeze_after is not None:
            # Distributed training looks for unused weights in every step. When all weights are trained, PyTorch's C++ code
            # warns about that, and only this variable silences it. It is read when torch is loaded.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        do_without_broken(UNUSED_BY_TRAINING)
        with import_extra("train", "train"):
            from capcli.training.run import run
        return run(options, folder)


def train_options(given: dict[str, Any]) -> TrainOptions:
    """The options that the command's parameters describe. Raises UsageError and click.MissingParameter."""
    out = given["out"]
    if not out:
        raise click.MissingParameter(param_hint="--out", param_type="option")
    if given["resume"] and not given["data"] and not given["task"] and not os.path.exists(os.path.join(out, SETTINGS)):
        raise UsageError(
            f"--out {out} contains no run to resume (no {SETTINGS}): restore that file, or to start a run also give "
            "--data and a model"
        )
    data = data_from(given)
    parts = {
        "data": data,
        "model": ModelOptions(**fields_from(ModelOptions, given)),
        "generation": generation_from({**given, "seed": None}),  # --seed is that of the training
        "task": tuple(task_of(table, data.seed) for table in given["task"] or ()),
    }
    return TrainOptions(**fields_from(TrainOptions, given) | parts)
