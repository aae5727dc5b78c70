"""`capcli train`: parse, build TrainOptions, run the training, exit with its code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from capcli.cli.config import chosen, config_option, read
from capcli.cli.data import data_options, taken_data_options
from capcli.cli.generation import generation_options, taken_generation
from capcli.cli.parts import parts_options
from capcli.cli.sections import AutoOrNumber, SectionedCommand, SectionedOption, set_note
from capcli.errors import CapcliError, UsageError
from capcli.options import DECODE_TIMEOUT, MAX_PIXELS, ModelOptions, TrainOptions, task_of
from capcli.options.training_model import PARTS

Decorator = Callable[[Any], Any]
SETTINGS = "train.toml"  # what a run keeps its settings in


def under(section: str) -> Callable[..., Decorator]:
    return partial(click.option, cls=SectionedOption, section=section, show_envvar=False)


learning, evaluation, output, running = map(under, ("Learning", "Evaluation and checkpoints", "Output", "Running"))


class Tasks(click.ParamType[Any]):
    """Tables of a TOML file, which no flag can say."""

    name = "[[task]]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, list | tuple) or not all(isinstance(table, Mapping) for table in value):
            self.fail("tasks stand in a file for --config, each in a [[task]] of its own", param, ctx)
        return tuple(value)


class StepsOrEpoch(click.ParamType[Any]):
    """A number of steps, or the word epoch."""

    name = "N|epoch"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "epoch":
            return value
        try:
            steps = int(value)
        except (TypeError, ValueError):
            steps = 0
        if steps < 1:
            self.fail(f"{value!r} is neither a number of steps nor 'epoch'", param, ctx)
        return steps


# What one option, given itself, makes of others that come from a file.
INSTEAD = {
    "model": (*PARTS, "tokenizer", "join", "image_tokens", "tag_tokens", "extra_tokens"),
    "encoder": ("model",),
    "decoder": ("model",),
    "epochs": ("max_steps",),
}
NOTHING = {"extra_tokens": 0}  # what says nothing, where that is not None


class TrainCommand(SectionedCommand):
    """With --resume, what is not given is as the run in --out has it. A flag wins over all in a file that it stands for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = list(args)
        rest = super().parse_args(ctx, args)
        saved = os.path.join(ctx.params.get("out") or "", SETTINGS)
        if ctx.params.get("resume") and ctx.params.get("out") and os.path.exists(saved):
            ctx.default_map = {**chosen(read(saved), str(self.name), saved), **(ctx.default_map or {})}
            ctx.params = {}
            rest = super().parse_args(ctx, given)
        for name, others in INSTEAD.items():
            for other in others:
                if from_file(ctx, other) and not from_file(ctx, name) and ctx.params.get(name) is not None:
                    ctx.params[other] = NOTHING.get(other)
        return rest


def from_file(ctx: click.Context, name: str) -> bool:
    """Whether a parameter is as a file has it, or as it is by itself."""
    return ctx.get_parameter_source(name) in (ParameterSource.DEFAULT_MAP, ParameterSource.DEFAULT)


@click.command(cls=TrainCommand, short_help="Train a captioner on images with captions.")
@data_options
@parts_options
@learning(
    "--epochs",
    metavar="X",
    type=click.FloatRange(min=0, min_open=True),
    default=3.0,
    show_default=True,
    help="Passes over all captions.",
)
@learning("--max-steps", metavar="N", type=click.IntRange(min=1), help="Updates, in place of --epochs.")
@learning(
    "--batch-size",
    metavar="N",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Captions per device and pass.",
)
@learning(
    "--accumulation", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Passes per update."
)
@learning(
    "--learning-rate",
    metavar="X",
    type=click.FloatRange(min=0, min_open=True),
    default=5e-5,
    show_default=True,
    help="At its peak.",
)
@learning(
    "--schedule",
    type=click.Choice(
        ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "reduce_lr_on_plateau"]
    ),
    default="linear",
    show_default=True,
    help="How the learning rate goes down.",
)
@learning(
    "--warmup",
    metavar="N|SHARE",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Updates in which the learning rate rises; below 1, a share of all.",
)
@learning(
    "--weight-decay",
    metavar="X",
    type=click.FloatRange(min=0),
    default=0.01,
    show_default=True,
    help="Of matrices; biases and norms have none.",
)
@learning(
    "--adam-beta2",
    metavar="X",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.999,
    show_default=True,
    help="Memory of AdamW's second moment.",
)
@learning(
    "--max-grad-norm",
    metavar="X",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Clip gradients to this norm; 0 is off.",
)
@learning(
    "--label-smoothing",
    metavar="X",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the truth given to all tokens alike.",
)
@learning(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="To compute in; weights stay float32. auto is bfloat16 on GPUs that have it.",
)
@learning("--gradient-checkpointing", is_flag=True, help="Less memory for more time.")
@learning(
    "--freeze",
    type=click.Choice(["encoder", "decoder", "none"]),
    default="none",
    show_default=True,
    help="What does not learn; a decoder's new cross-attention does all the same.",
)
@learning("--unfreeze-after", metavar="STEPS", type=click.IntRange(min=1), help="From here on it learns too.")
@learning(
    "--mask-patches",
    metavar="SHARE",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Hide that share of each image's patches from the encoder.",
)
@learning("--task", type=Tasks(), hidden=True)
@evaluation(
    "--evaluate-every", type=StepsOrEpoch(), default="epoch", show_default=True, help="Validate, and save, that often."
)
@evaluation("--save-every", type=StepsOrEpoch(), help="Save that often too, to resume from.")
@evaluation(
    "--keep-best",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Checkpoints to keep besides the last.",
)
@evaluation(
    "--select",
    type=click.Choice(["loss", "cider"]),
    default="loss",
    show_default=True,
    help="What the best is best by: validation loss, or CIDEr of its captions.",
)
@evaluation(
    "--caption-images",
    metavar="N",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Validation images to caption, for CIDEr.",
)
@evaluation(
    "--patience", metavar="N", type=click.IntRange(min=1), help="Stop early, after N evaluations without a better one."
)
@evaluation(
    "--log-every",
    metavar="N",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Updates per row of history.csv.",
)
@generation_options
@output("-o", "--out", metavar="FOLDER", type=click.Path(), help="Where the captioner and its checkpoints go.")
@output(
    "--resume", is_flag=True, help="Go on with the run in --out, where there is one; settings are taken from there."
)
@output("--overwrite", is_flag=True, help="Throw away the run in --out.")
@running(
    "--device",
    type=click.Choice(["auto", "cpu"]),
    default="auto",
    show_default=True,
    help="Where to compute; CUDA_VISIBLE_DEVICES chooses a GPU.",
)
@running("--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads for the model. [default: all cores]")
@running("--workers", type=AutoOrNumber(0), default="auto", show_default=True, help="Processes that load images.")
@running(
    "--max-pixels",
    metavar="N",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Leave out images of more pixels than this.",
)
@running(
    "--decode-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=DECODE_TIMEOUT,
    show_default=True,
    help="Leave out images that take longer to decode.",
)
@config_option()
@running("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def train(**given: Any) -> int:
    """Train a captioner: from an encoder and a decoder, or from a captioner that is there.

    \b
      capcli train --encoder google/vit-base-patch16-224 --decoder gpt2 \\
        --data captions.txt --val-fraction 0.05 --out my-captioner
      capcli caption ./photos --model my-captioner

    With a T5 for a decoder a file for --config may hold several tasks, each a [[task]] with name, data, kind (caption,
    classify or masked), weight and question.

    The folder is a plain transformers model: the best checkpoint by --select, with its history, curves and model card.
    What is given under Generation is what the captioner does by itself. Ctrl-C saves and leaves; the same command with
    --resume goes on with the batches that would have come. On several GPUs: torchrun --nproc-per-node gpu -m capcli train.

    \b
    Exit codes: 0 trained; 2 wrong usage; 1 could not run; 130 or 143 interrupted (--resume goes on from there).
    """
    options = train_options(given)
    from capcli.training.output.folder import RunFolder

    place = RunFolder.open(options)  # which may refuse, before torch is loaded
    if options.unfreeze_after is not None:
        # Several processes look for weights at rest at every step, and once all learn PyTorch would call that a mistake, in a
        # line of C++'s that nothing else silences. It is read when torch is loaded.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        from capcli.training.run import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("capcli"):
            raise
        raise CapcliError(f"capcli train needs {error.name}: pip install 'capcli[train]'") from error
    return run(options, place)


def train_options(given: dict[str, Any]) -> TrainOptions:
    """The command's parameters, by name, in the dataclass that each belongs to. Raises UsageError for what cannot be."""
    out = given.get("out")
    if not out:
        raise click.MissingParameter(param_hint="--out", param_type="option")
    if given["resume"] and not given["data"] and not given["task"] and not os.path.exists(os.path.join(out, SETTINGS)):
        raise UsageError(f"--out {out} holds no run to go on with; to begin one, give --data and what to train too")
    generation = taken_generation({**given, "seed": None})  # the seed is the training's
    data = taken_data_options(given)

    def taken(kind: type) -> dict[str, Any]:
        names = kind.__dataclass_fields__  # type: ignore[attr-defined]
        return {name: given[name] for name in names if name in given}

    model = ModelOptions(**taken(ModelOptions))
    tasks = tuple(task_of(table, data.seed) for table in given["task"] or ())
    parts = {"data": data, "model": model, "generation": generation, "task": tasks}
    return TrainOptions(**taken(TrainOptions) | parts)
