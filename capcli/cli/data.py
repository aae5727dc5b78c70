"""Options that say which images with captions to read: shared by the commands that take `--data`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from capcli.cli.sections import SectionedOption
from capcli.options import DataOptions

option = partial(click.option, cls=SectionedOption, section="Data", show_envvar=False)
FILE = click.Path()

OPTIONS = (
    option(
        "--data",
        metavar="PATH",
        type=FILE,
        multiple=True,
        help="Images with captions: CSV, TSV, JSONL or Parquet, Flickr token files, COCO or Karpathy JSON, an imagefolder, "
        "a dataset on disk, or what prepare wrote; repeatable.",
    ),
    option("--val-data", metavar="PATH", type=FILE, multiple=True, help="The same, for validation; repeatable."),
    option("--image-root", metavar="FOLDER", type=FILE, help="Where the images are. [default: by the annotations]"),
    option("--image-column", metavar="NAME", help="Column or key of the image's name. [default: the usual ones]"),
    option("--caption-column", metavar="NAME", help="Column or key of the caption. [default: the usual ones]"),
    option("--split-column", metavar="NAME", help="Column or key that says train, val or test."),
    option(
        "--tags-column",
        metavar="NAME",
        help="Column or key of words on the image, a text or a list: [dog] [bark]. For --join prefix.",
    ),
    option("--train-names", metavar="FILE", type=FILE, help="Train on the images listed here, one name per line."),
    option("--val-names", metavar="FILE", type=FILE, help="Validate on the images listed here, one name per line."),
    option(
        "--val-fraction",
        metavar="SHARE",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Validate on this share of the images, drawn by image.",
    ),
    option(
        "--train-limit",
        metavar="N|SHARE",
        type=float,
        help="Train on that many images, or that share below 1, at random.",
    ),
    option(
        "--val-limit",
        metavar="N|SHARE",
        type=float,
        help="Validate on that many images, or that share below 1, at random.",
    ),
    option(
        "--label-template",
        metavar="TEXT",
        help="Folders of images are classes: caption them with this, the folder's name for {label}.",
    ),
    option("--seed", metavar="N", type=int, default=42, show_default=True, help="Seed of everything that is drawn."),
)


def data_options(command: Any) -> Any:
    """Adds OPTIONS to a command, in their order."""
    for each in reversed(OPTIONS):
        command = each(command)
    return command


def taken_data_options(given: dict[str, Any]) -> DataOptions:
    """The data options among a command's parameters, which are taken out of `given`; only the seed stays."""
    names = DataOptions.__dataclass_fields__
    values = {name: given[name] if name == "seed" else given.pop(name) for name in names}
    return DataOptions(**values)
