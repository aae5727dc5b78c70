"""`capcli prepare`: parses the command line into PrepareOptions and stores the copy."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.click_options import SectionedCommand, debug_option, fields_from, import_extra, option, typed_option_in
from capcli.cli.config_file import config_option
from capcli.cli.shared_options import data_from, data_options, image_limits, quiet_option, workers_option
from capcli.errors import UsageError
from capcli.options import DownloadOptions, PrepareOptions

output = partial(option, PrepareOptions, section="Output")
download = partial(option, DownloadOptions, section="Downloads")


@click.command(cls=SectionedCommand, short_help="Store a compact copy of images and captions for training.")
@data_options
@option(
    PrepareOptions,
    "--url-column",
    section="Data",
    metavar="NAME",
    help="Download the images: this column or key of a table contains their URLs.",
)
@image_limits(PrepareOptions, section="Data")
@output("-o", "--out", metavar="FOLDER", type=click.Path(), required=True, help="Folder of the copy.")
@output("--edge", help="Shorter edge of the stored images in pixels. Smaller images keep their size.")
@output("--format", help="Format of the stored images.")
@output("--quality", help="Quality of jpeg and webp. [default: 95]")
@output("--shard-size", help="Images per file.")
@output("--overwrite", help="Replace --out and start from scratch.")
@output("--retry-failed", help="Try images again that failed in earlier runs.")
@download("--connections", help="Maximum number of downloads at a time.")
@download("--per-host", help="Maximum number of downloads from one host at a time.")
@download("--retries", help="Further attempts after an error that may be temporary.")
@download("--download-timeout", field="timeout", metavar="SECONDS", help="Time limit of one attempt.")
@download("--max-bytes", help="Reject files with more bytes than this.")
@workers_option(
    PrepareOptions,
    help="Processes that decode and encode images. auto: one per CPU; 0: in the main process.",
)
@config_option()
@quiet_option("Print neither progress nor summary.")
@debug_option
def prepare(**given: Any) -> int:
    """Store a compact copy of images and captions, which capcli train reads at full speed.

    \b
      capcli prepare --data captions.txt --val-fraction 0.05 --out prepared
      capcli prepare --data pairs.csv --url-column url --caption-column text --out prepared

    Images are rotated upright, converted to RGB, resized, encoded, and stored in files of --shard-size images. The copy is
    a dataset that datasets.load_from_disk opens. Images that cannot be stored are listed in failures.jsonl. The same
    command with the same --out resumes where the last run ended, and writes damaged files again.

    \b
    Exit codes:
      0         all images are stored
      1         the run failed
      2         wrong usage
      3         the run finished; some images or rows were left out
      130, 143  interrupted; the same command resumes the run
    """
    if given["url_column"] is None and (typed := typed_option_in("Downloads")):
        raise UsageError(f"{typed} is for downloads: name the column of URLs with --url-column")
    download = DownloadOptions(timeout=given["download_timeout"], **fields_from(DownloadOptions, given))
    options = PrepareOptions(**fields_from(PrepareOptions, given) | {"data": data_from(given), "download": download})
    with import_extra("prepare", "train"):
        from capcli.prepare import run

    return run.run(options)
