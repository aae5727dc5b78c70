"""`capcli prepare`: parse, build PrepareOptions, store the copy, exit with its code."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import click
from click.core import ParameterSource

from capcli.cli.config import config_option
from capcli.cli.data import data_options, taken_data_options
from capcli.cli.sections import AutoOrNumber, SectionedCommand, SectionedOption, set_note
from capcli.errors import CapcliError, UsageError
from capcli.options import DECODE_TIMEOUT, MAX_PIXELS, DownloadOptions, PrepareOptions

DOWNLOAD = DownloadOptions()
data, output, download, running = (
    partial(click.option, cls=SectionedOption, section=section, show_envvar=False)
    for section in ("Data", "Output", "Downloads", "Running")
)


@click.command(cls=SectionedCommand, short_help="Store images and captions once, for training to read quickly.")
@data_options
@data(
    "--url-column",
    metavar="NAME",
    help="Fetch the images: this column or key of a table holds their addresses.",
)
@data(
    "--max-pixels",
    metavar="N",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Leave out images of more pixels than this.",
)
@data(
    "--decode-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=DECODE_TIMEOUT,
    show_default=True,
    help="Give up on an image that takes longer to decode.",
)
@output("-o", "--out", metavar="FOLDER", type=click.Path(), required=True, help="Write the copy here.")
@output(
    "--edge",
    metavar="N",
    type=click.IntRange(min=1, max=16_383),
    default=256,
    show_default=True,
    help="Pixels of the shorter edge; smaller images stay as they are.",
)
@output(
    "--format",
    type=click.Choice(["jpeg", "png", "webp"]),
    default="jpeg",
    show_default=True,
    help="How copies are encoded.",
)
@output("--quality", metavar="N", type=click.IntRange(1, 100), help="Quality of jpeg and webp. [default: 95]")
@output(
    "--shard-size",
    metavar="N",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Images per file.",
)
@output("--overwrite", is_flag=True, help="Start --out anew.")
@output("--retry-failed", is_flag=True, help="Try images again that failed in an earlier run.")
@download(
    "--connections",
    metavar="N",
    type=click.IntRange(min=1),
    default=DOWNLOAD.connections,
    show_default=True,
    help="Images fetched at a time.",
)
@download(
    "--per-host",
    metavar="N",
    type=click.IntRange(min=1),
    default=DOWNLOAD.per_host,
    show_default=True,
    help="Of these, at most so many from one host.",
)
@download(
    "--retries",
    metavar="N",
    type=click.IntRange(min=0),
    default=DOWNLOAD.retries,
    show_default=True,
    help="Tries after the first, when a later one may succeed.",
)
@download(
    "--download-timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=DOWNLOAD.timeout,
    show_default=True,
    help="Give up on a try that takes longer.",
)
@download(
    "--max-bytes",
    metavar="N",
    type=click.IntRange(min=1),
    default=DOWNLOAD.max_bytes,
    show_default=True,
    help="Give up on files larger than this.",
)
@running(
    "--workers",
    type=AutoOrNumber(0),
    default="auto",
    show_default=True,
    help="Processes that decode and encode images; auto is one per CPU, 0 does it in this one.",
)
@config_option()
@running("-q", "--quiet", is_flag=True, help="No progress and no closing line.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def prepare(**given: Any) -> int:
    """Store a compact copy of images and captions, which `capcli train` reads at full speed.

    \b
      capcli prepare --data captions.txt --val-fraction 0.05 --out prepared
      capcli prepare --data pairs.csv --url-column url --caption-column text --out prepared

    Images are turned upright, made RGB, resized, encoded anew, and stored in files of --shard-size images: a dataset that
    datasets.load_from_disk opens. What cannot be stored is listed in failures.jsonl. A rerun with the same --out goes on
    where the last one ended, and makes files anew that are damaged.

    \b
    Exit codes: 0 all stored; 3 finished, with images or rows left out; 2 wrong usage; 1 could not run;
    130 or 143 interrupted (the same command goes on from there).
    """
    refuse_idle_options(given)
    options = PrepareOptions(
        data=taken_data_options(given),
        download=DownloadOptions(
            timeout=given.pop("download_timeout"),
            **{name: given.pop(name) for name in ("connections", "per_host", "retries", "max_bytes")},
        ),
        **{name: value for name, value in given.items() if name != "seed"},
    )
    try:
        from capcli.prepare import run
    except ModuleNotFoundError as error:
        raise CapcliError(f"capcli prepare needs {error.name}: pip install 'capcli[train]'") from error

    return run.run(options)


def refuse_idle_options(given: Mapping[str, Any]) -> None:
    """Raises UsageError for a flag about downloads where nothing is downloaded; a file's or a variable's may wait."""
    context = click.get_current_context()
    for param in context.command.params:
        typed = context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if given["url_column"] is None and typed and getattr(param, "section", None) == "Downloads":
            raise UsageError(f"{param.opts[0]} is about downloads: name the column of addresses with --url-column")
