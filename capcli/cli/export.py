"""`capcli export`: parse, build ExportOptions, build the engine, exit with its code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import click
from click.core import ParameterSource

from capcli.cli.config import config_option
from capcli.cli.sections import SectionedCommand, SectionedOption, set_note
from capcli.errors import CapcliError, UsageError
from capcli.options import DEFAULT_MODEL, ExportOptions

Decorator = Callable[[Any], Any]


def under(section: str) -> Callable[..., Decorator]:
    return partial(click.option, cls=SectionedOption, section=section, show_envvar=False)


engine, model, plans, proof, running = map(under, ("Engine", "Model", "Plans (TensorRT)", "Proof", "Running"))


class Numbers(click.ParamType[Any]):
    """`1,8,64`, or the list that a recipe holds."""

    name = "N,N,.."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        try:
            return tuple(int(part) for part in parts)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is not whole numbers separated by commas", param, ctx)


@click.command(cls=SectionedCommand, short_help="Build an engine: ONNX graphs or TensorRT plans, with their proof.")
@engine("--onnx", is_flag=True, help="Graphs for ONNX Runtime, on CPU or CUDA.")
@engine("--trt", is_flag=True, help="Plans for TensorRT, on the GPU of this machine.")
@engine(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="What the engine computes in; for 8 bits see --quantize.",
)
@engine(
    "--profile",
    type=click.Choice(["fused", "portable"]),
    default="fused",
    show_default=True,
    help="Operators: fused ones (opset 24), or those of older runtimes (opset 18).",
)
@engine("--quantize", type=click.Choice(["int8"]), help="Weights of matrix products in 8 bits, for CPUs.")
@engine(
    "-o",
    "--out",
    metavar="FOLDER",
    type=click.Path(),
    help="Where it goes. [default: engines/<model>, or <model> in the folder that CAPCLI_ENGINES names]",
)
@engine("--overwrite", is_flag=True, help="Replace the engine in --out.")
@model(
    "--model",
    metavar="NAME",
    default=DEFAULT_MODEL,
    show_default=True,
    help="The captioner: a folder, or a name on the hub; with --trt an engine left unfinished, too.",
)
@model("--revision", metavar="REV", help="Branch, tag or commit of a model on the hub.")
@plans("--num-beams", metavar="N", type=click.IntRange(min=1), help="Rows of a slot. [default: the model's]")
@plans(
    "--max-new-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    help="Tokens of a caption; 16 of a prompt fit too. [default: the model's]",
)
@plans("--batch-sizes", type=Numbers(), default="1,8,64,256", show_default=True, help="Images at once, a plan each.")
@proof("--verify-with", metavar="FOLDER", type=click.Path(), help="Images to prove it with. [default: drawn ones]")
@proof("--force", is_flag=True, help="Keep an engine that fails its proof.")
@config_option("--recipe", help="Take options from a recipe (engines/*.toml); flags win.")
@running(
    "--device",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="Where the proof runs: auto, cpu, cuda or cuda:N.",
)
@running("--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads for the proof. [default: all cores]")
@running("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def export(**given: Any) -> int:
    """Build an engine from a captioner, and prove that it says the same.

    \b
      capcli export --onnx --model my-captioner --out engines/my-captioner
      capcli caption ./photos --model engines/my-captioner

    The engine is a folder that needs neither the captioner nor a hub: graphs or plans, tokenizer, image processor,
    settings, and engine.json with the proof. One that fails its proof is not kept.

    \b
    Exit codes: 0 built and proved; 2 wrong usage; 1 could not be built, or failed its proof.
    """
    taken = {name: given[name] for name in ExportOptions.__dataclass_fields__ if name in given}
    options = ExportOptions(kind=kind(given), **taken)
    refuse_idle_options(options)
    try:
        from capcli.export import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("capcli"):
            raise
        raise CapcliError(f"capcli export needs {error.name}: pip install 'capcli[onnx]'") from error
    return run.run(options)


def kind(given: dict[str, Any]) -> Literal["onnx", "tensorrt"]:
    """What to build: the flag that was typed wins over a recipe's."""
    typed = click.get_current_context().get_parameter_source
    asked = [name for name in ("onnx", "trt") if given[name]]
    if len(asked) > 1:
        asked = [name for name in asked if typed(name) is ParameterSource.COMMANDLINE]
    if len(asked) != 1:
        raise click.UsageError("say what to build: --onnx or --trt")
    return "onnx" if asked == ["onnx"] else "tensorrt"


def refuse_idle_options(options: ExportOptions) -> None:
    """Raises UsageError for a typed flag about plans where none is built; a recipe's serves both kinds."""
    context = click.get_current_context()
    for param in context.command.params:
        typed = context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if options.kind == "onnx" and typed and getattr(param, "section", None) == "Plans (TensorRT)":
            raise UsageError(f"{param.opts[0]} is for plans (--trt): graphs take any, so leave it out")
