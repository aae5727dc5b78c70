"""What there is to store: images with captions by split, found on disk or named by their addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from capcli.annotations import read_split
from capcli.options import PrepareOptions
from capcli.progress import warn
from capcli.records import Annotated, Failure


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
    split = read_split(data, locate=options.url_column is None)
    if not options.quiet:
        for note in split.report.notes:
            warn(note)
    return Listed({"train": split.train, "val": split.val}, split.report.failures)
