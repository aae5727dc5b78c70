"""What there is to store: images with captions by split, found on disk or named by their addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from capcli.annotations import read_split
from capcli.errors import CapcliError
from capcli.options import PrepareOptions
from capcli.records import Annotated, Failure


@dataclass(frozen=True, slots=True)
class Listed:
    """Images by split, and what the annotations name that cannot be stored."""

    splits: Mapping[str, Sequence[Annotated]]
    failures: Sequence[Failure]


def read_source(options: PrepareOptions) -> Listed:
    """The images that the annotations list. Raises CapcliError where there is none."""
    data = options.data
    if options.url_column is not None:
        data = replace(data, image_column=options.url_column)
    split = read_split(data, locate=options.url_column is None)
    if not split.train and not split.val:
        raise CapcliError(f"{', '.join(data.data + data.val_data)}: no image with a caption")
    return Listed({"train": split.train, "val": split.val}, split.report.failures)
