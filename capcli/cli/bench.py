"""`capcli bench`: parse, build BenchOptions, measure, exit with its code."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.generation import generation_options, taken_generation
from capcli.cli.model import leave_cores_to, model_options
from capcli.cli.sections import SectionedCommand, SectionedOption, comma_separated, set_note
from capcli.options import BenchOptions
from capcli.options.bench import LEAST_ROUNDS, PEERS

contest, running = (
    partial(click.option, cls=SectionedOption, section=section, show_envvar=False) for section in ("Contest", "Running")
)


@click.command(cls=SectionedCommand, short_help="Measure how fast captions are made, and where the time goes.")
@click.argument("photos", nargs=-1, required=True, type=click.Path())
@model_options
@contest(
    "--against",
    metavar="PEER,...",
    callback=comma_separated,
    help=f"Caption the same photos beside: {', '.join(PEERS)}. single is generate() as model cards have it, one photo at a "
    "time; batched in float32, bfloat16 and compiled (a static cache, bfloat16) in batches; optimum its ONNX model.",
)
@contest(
    "--peer-python",
    metavar="PATH",
    type=click.Path(),
    help="Python of the peers, as of an environment with Optimum.",
)
@contest(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=1),
    default=LEAST_ROUNDS,
    show_default=True,
    help="Turns of each; the median counts.",
)
@contest("--at-least", metavar="X", type=click.FloatRange(min=0), help="Fail unless X times as fast as every peer.")
@generation_options
@running("--limit", metavar="N", type=click.IntRange(min=1), help="Take the first N photos only.")
@running("--gpu-decode", is_flag=True, help="As in capcli caption; stages are told as without it.")
@running("--quick", is_flag=True, help="The contest only: no stages, no ceiling.")
@running("--json", is_flag=True, help="The line of JSON only.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def bench(**given: Any) -> int:
    """Measure how fast PHOTOS are captioned: the ceiling of this machine, every stage, and all of it from files to rows.

    \b
      capcli bench ./photos --model my-captioner
      capcli bench ./photos --num-beams 4 --against batched,bfloat16

    The ceiling is what the captioner's own arithmetic and bytes would take at the peak rates of this machine, which are
    measured first. Contestants have a process each and take turns; loading is not counted, and each warms up before.
    The last line is JSON with every figure.

    \b
    Exit codes: 0 measured; 2 wrong usage; 1 could not be measured, or is slower than --at-least asks.
    """
    generation = taken_generation(given)
    names = BenchOptions.__dataclass_fields__
    options = BenchOptions(
        **{name: value for name, value in given.items() if name in names} | {"generation": generation}
    )
    leave_cores_to(options.model)
    from capcli.bench.run import run

    return run(options)
