"""`capcli bench`: parses the command line into BenchOptions and runs the benchmark."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.click_options import (
    SectionedCommand,
    comma_separated,
    debug_option,
    do_without_broken,
    fields_from,
    option,
)
from capcli.cli.shared_options import generation_from, generation_options, model_options, set_openmp_wait_policy
from capcli.imports import UNUSED_BY_CAPTIONING
from capcli.options import BenchOptions
from capcli.options.bench import BASELINES

comparison = partial(option, BenchOptions, section="Comparison")
execution = partial(option, BenchOptions, section="Execution")


@click.command(cls=SectionedCommand, short_help="Measure the speed of captioning, and where the time goes.")
@click.argument("photos", nargs=-1, required=True, type=click.Path())
@model_options
@comparison(
    "--against",
    metavar="BASELINE,...",
    callback=comma_separated,
    help=f"Also caption the photos with baselines: {', '.join(BASELINES)}. single calls generate() of transformers for one "
    "photo at a time; batched (float32), bfloat16 and compiled (bfloat16, static cache) call it for batches; optimum runs "
    "Optimum's ONNX model.",
)
@comparison(
    "--peer-python",
    metavar="PATH",
    type=click.Path(),
    help="Python interpreter of the baselines, for example of an environment with Optimum. [default: this one]",
)
@comparison("--rounds", help="Rounds of measurement; the median is reported.")
@comparison("--at-least", help="Fail unless capcli is X times as fast as every baseline.")
@generation_options
@execution("--limit", help="Use only the first N photos.")
@execution("--gpu-decode", help="Decode JPEGs on the GPU, as in capcli caption. Stages are measured without it.")
@execution("--quick", help="Measure only the end-to-end speed: neither stages nor the peak rates of the machine.")
@execution("--json", help="Print only the line of JSON.")
@debug_option
def bench(**given: Any) -> int:
    """Measure how fast PHOTOS are captioned: peak rates of the machine, each stage, and end to end from files to rows.

    \b
      capcli bench ./photos --model my-captioner
      capcli bench ./photos --num-beams 4 --against batched,bfloat16

    The upper bound is the speed at which the arithmetic and the memory traffic of the model would run at the measured
    peak rates of the machine. capcli and each baseline run in processes of their own, warm up, and take turns; loading is
    not measured. The last line of the output is JSON with all figures.

    \b
    Exit codes:
      0  measured
      1  not measured, or slower than --at-least
      2  wrong usage
    """
    options = BenchOptions(generation=generation_from(given), **fields_from(BenchOptions, given))
    set_openmp_wait_policy(options.model)
    do_without_broken(UNUSED_BY_CAPTIONING)
    from capcli.bench.run import run

    return run(options)
