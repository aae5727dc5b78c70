"""What there is to store: images with captions by split, found on disk or named by their addresses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from capcli.annotations import read_split
from capcli.annotations.datasets import is_dataset
from capcli.errors import UsageError
from capcli.options import PrepareOptions
from capcli.progress import warn
from capcli.records import Annotated, Failure, Stored
from capcli.text import printable


@dataclass(frozen=True, slots=True)
class Listed:
    """Images by split, and what the annotations name that cannot be stored."""

    splits: Mapping[str, Sequence[Annotated]]
    failures: Sequence[Failure]


def read_source(options: PrepareOptions) -> Listed:
    """The images that the annotations list. Raises UsageError and CapcliError as `read_split`: where there is none, too."""
    data = options.data
    if options.url_column is not None:
        data = replace(data, image_column=options.url_column)
    # A file that is missing is one more image that cannot be read: it has its place when it comes back.
    split = read_split(data, locate=options.url_column is None, keep_missing=True)
    if not options.quiet:
        for note in split.report.notes:
            warn(note)
    return Listed({"train": split.train, "val": split.val}, split.report.failures)


def refuse_own(options: PrepareOptions, listed: Listed, own: Iterable[str]) -> None:
    """Raises UsageError where something that is read is among the files of the copy, which are its `own`, by any way."""
    files = set(map(os.path.realpath, own))
    data = options.data
    read = [*data.data, *data.val_data, *filter(None, (data.train_names, data.val_names))]
    images = (image.image for split in listed.splits.values() for image in split)
    read += {image.folder for image in images if isinstance(image, Stored)}
    for path in read:
        if not files.isdisjoint(_files(path)):
            raise UsageError(
                f"{printable(path)} is read, and is a part of what --out {printable(options.out)} holds: name another --out"
            )


def _files(path: str) -> Iterator[str]:
    """The file at `path`, or those of the dataset that is there, as they are without links."""
    yield os.path.realpath(path)
    if os.path.isdir(path) and is_dataset(path):
        with os.scandir(path) as entries:
            for entry in entries:
                yield os.path.realpath(entry.path)
                if entry.is_dir():
                    yield from (os.path.realpath(os.path.join(entry.path, name)) for name in os.listdir(entry.path))
