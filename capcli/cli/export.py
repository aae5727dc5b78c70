"""`capcli export`: parses the command line into ExportOptions and builds the engine."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import click
from click.core import ParameterSource

from capcli.cli.click_options import (
    SectionedCommand,
    debug_option,
    do_without_broken,
    fields_from,
    flag_option,
    import_extra,
    model_or,
    option,
    typed_option_in,
)
from capcli.cli.config_file import config_option
from capcli.cli.shared_options import quiet_option
from capcli.errors import UsageError
from capcli.imports import UNUSED_BY_CAPTIONING
from capcli.options import DEFAULT_MODEL, ExportOptions

PLANS = "Plans (TensorRT)"

engine = partial(option, ExportOptions, section="Engine")
model = partial(option, ExportOptions, section="Model")
plans = partial(option, ExportOptions, section=PLANS)
parity = partial(option, ExportOptions, section="Parity check")
execution = partial(option, ExportOptions, section="Execution")


class Numbers(click.ParamType[Any]):
    """Whole numbers: `1,8,64`, or a list in a recipe."""

    name = "N,N,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not a list of whole numbers separated by commas", param, ctx)


@click.command(
    cls=SectionedCommand, short_help="Build an engine, ONNX graphs or TensorRT plans, and check its captions."
)
@flag_option("--onnx", section="Engine", help="Build ONNX graphs for ONNX Runtime, on CPU or CUDA.")
@flag_option("--trt", section="Engine", help="Build TensorRT plans for the GPU of this machine.")
@engine("--dtype", help="Precision of the engine. For 8 bits see --quantize.")
@engine("--profile", help="ONNX operators: fused (opset 24), or portable (opset 18) for older runtimes.")
@engine("--quantize", help="Round the weights of matrix products to 8 bits, for CPUs.")
@engine(
    "-o",
    "--out",
    metavar="FOLDER",
    type=click.Path(),
    help="Folder of the engine. [default: engines/<model>, or <model> in the folder that CAPCLI_ENGINES names]",
)
@engine("--overwrite", help="Replace the engine in --out.")
@model(
    "--model",
    metavar="ID|FOLDER",
    help="Captioner: a name on the Hugging Face Hub, or a folder. With --trt also an unfinished engine, to finish it.",
    **model_or(DEFAULT_MODEL),
)
@model("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub.")
@plans("--num-beams", help="Number of beams. [default: that of the model]")
@plans(
    "--max-new-tokens",
    help="Maximum length of a caption in tokens; 16 more are reserved for a prompt. [default: that of the model]",
)
@plans("--batch-sizes", type=Numbers(), help="Batch sizes; each gets a plan of its own.")
@parity(
    "--verify-with",
    metavar="FOLDER",
    type=click.Path(),
    help="Images for the parity check. [default: generated images]",
)
@parity("--force", help="Keep an engine that fails its parity check.")
@config_option(
    "--recipe", help="Read options from a recipe (engines/*.toml). Options on the command line take precedence."
)
@execution("--device", metavar="auto|cpu|cuda[:N]", help="Device of the parity check.")
@execution("--threads", help="CPU threads of the parity check. [default: all cores]")
@quiet_option("Print nothing but errors.")
@debug_option
def export(**given: Any) -> int:
    """Build an engine from a captioner, and check that it gives the same captions.

    \b
      capcli export --onnx --model my-captioner --out engines/my-captioner
      capcli caption ./photos --model engines/my-captioner

    The engine is a folder that needs neither the captioner nor the Hub: graphs or plans, tokenizer, image processor,
    generation settings, and engine.json with the result of the parity check. An engine that fails the check is deleted.

    \b
    Exit codes:
      0  built; the parity check passed, or --force was given
      1  not built, or the parity check failed
      2  wrong usage
    """
    options = ExportOptions(kind=engine_kind(given), **fields_from(ExportOptions, given))
    if options.kind == "onnx" and (typed := typed_option_in(PLANS)):
        raise UsageError(f"{typed} is for plans (--trt); ONNX graphs take any value: leave it out")
    do_without_broken(UNUSED_BY_CAPTIONING)
    with import_extra("export", "onnx"):
        from capcli.export import run
    return run.run(options)


def engine_kind(given: dict[str, Any]) -> Literal["onnx", "tensorrt"]:
    """The kind of engine to build: a flag on the command line takes precedence over a recipe. Raises click.UsageError."""
    source_of = click.get_current_context().get_parameter_source
    kinds = [name for name in ("onnx", "trt") if given[name]]
    if len(kinds) > 1:
        kinds = [name for name in kinds if source_of(name) is ParameterSource.COMMANDLINE]
    if len(kinds) != 1:
        raise click.UsageError("name one kind of engine: --onnx or --trt")
    return "onnx" if kinds == ["onnx"] else "tensorrt"
