"""Options that say which captioner captions and what it computes in: shared by the commands that make captions."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import click

from capcli.cli.sections import AutoOrNumber, SectionedOption
from capcli.options import DEFAULT_MODEL

option = partial(click.option, cls=SectionedOption, section="Model", show_envvar=False)

OPTIONS = (
    option(
        "-m",
        "--model",
        metavar="ID|FOLDER",
        default=DEFAULT_MODEL,
        show_default=True,
        help="The captioner: a name on the hub, or a folder; an engine too.",
    ),
    option("--device", metavar="auto|cpu|cuda[:N]", default="auto", show_default=True, help="Where to compute."),
    option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16", "int8"]),
        default="auto",
        show_default=True,
        help="Precision; auto is bfloat16 where the hardware computes in it, else float32. int8, on CPUs: layers' products in "
        "8 bits, the rest in float32 or bfloat16.",
    ),
    option(
        "--batch-size",
        type=AutoOrNumber(1),
        default="auto",
        show_default=True,
        help="Images decoded at a time (slots); auto fits the device's memory and the number of images.",
    ),
    option(
        "--threads", metavar="N", type=click.IntRange(min=1), help="CPU threads for the model. [default: all cores]"
    ),
)


def model_options(command: Any) -> Any:
    """Adds OPTIONS to a command, in their order."""
    for each in reversed(OPTIONS):
        command = each(command)
    return command


def leave_cores_to(model: str) -> None:
    """Where an engine wants the cores, PyTorch's threads sleep between searches instead of spinning (BENCHMARKS.md).

    OpenMP reads the variable when torch is imported, so this comes before; a value that is there stays.
    """
    from capcli.models.model_files import is_engine

    if is_engine(os.path.expanduser(model)):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
