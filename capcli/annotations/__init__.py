"""Images with captions, from every format people have them in: on one page, from files to a training split.

split = read_split(DataOptions(data=("captions.txt",), val_fraction=0.1))
train = check_images(split.train, split.report)
print(split.report.line())
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence

from capcli.annotations.data_report import DataReport
from capcli.annotations.decode_check import check_images
from capcli.annotations.detection import recognise
from capcli.annotations.images import Image, gather, usable
from capcli.annotations.rows import Annotations
from capcli.annotations.splits import Split, limited, marked, set_aside, sorted_out, validating, without
from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Annotated
from capcli.text import printable

__all__ = ["DataReport", "Split", "check_images", "read_annotations", "read_split"]


def read_annotations(
    paths: Sequence[str], options: DataOptions, *, locate: bool, report: DataReport
) -> Iterator[Annotated]:
    """Each image that the annotations at `paths` caption, in order of appearance, with all its captions.

    `locate` finds the images, and puts those that are not there into the report; without it `image` is None, nothing is
    looked for, and an image is told by its name alone. A caption that one file repeats is kept (annotators do agree, and
    CIDEr counts them); one that a second file repeats is not. Of `options` only the columns and `image_root` are read.

    Raises UsageError where a path or a column that was named is not there, and CapcliError for what cannot be read, and
    where no image with a caption is left; both before the first image.
    """
    with _uncollected():
        images = _gathered(paths, options, report, by_file=locate)
        found = usable(images, options.image_root, report, locate=locate)
    report.count(found)
    return iter(found)


def read_split(options: DataOptions, *, locate: bool = True, keep_missing: bool = False) -> Split:
    """The images to train on and to validate on, found and told apart by image.

    What validates is said by `val_names`, `val_data` or `val_fraction`; failing these by the annotations themselves
    (a split column, Karpathy's splits, folders of splits); failing that nothing is. "test" is used for neither. An
    image that is in several splits, or in the data and in `val_data`, is not trained on. Without `locate` nothing is looked
    for: names are all there is to an image, as where they are addresses. With `keep_missing` images whose files are not
    there stay, unless none is there.

    Raises UsageError where `data` or what it names is not there, and CapcliError as `read_annotations`.
    """
    report = DataReport()
    with _uncollected():
        return _split(options, report, locate=locate, keep_missing=keep_missing)


def _split(options: DataOptions, report: DataReport, *, locate: bool, keep_missing: bool) -> Split:
    images = sorted_out(_gathered(options.data, options, report, by_file=locate), options, report)
    if not images:
        data = ", ".join(map(printable, options.data))
        raise CapcliError(f"{data}: nothing is left to train or validate on, all images being test or in no list")
    found = usable(images, options.image_root, report, locate=locate, keep_missing=keep_missing)
    train = [image for image in found if image.split != "val"]
    val = [image for image in found if image.split == "val"]
    if options.val_data:
        others = validating(_gathered(options.val_data, options, report, by_file=locate))
        val = usable(others, options.image_root, report, locate=locate, keep_missing=keep_missing)
        train = without(train, val, report)
    elif options.val_fraction is not None:
        train, val = set_aside(train, options.val_fraction, options.seed)
    train = list(marked(limited(train, options.train_limit, options.seed), "train"))
    val = list(marked(limited(val, options.val_limit, options.seed), "val"))
    report.count(train)
    report.count(val)
    return Split(train, val, report)


def _gathered(paths: Sequence[str], options: DataOptions, report: DataReport, *, by_file: bool) -> list[Image]:
    if not paths:
        raise UsageError("no data: name a file or folder of images with captions")
    if options.image_root is not None and not os.path.isdir(options.image_root):
        raise UsageError(f"--image-root {printable(options.image_root)} is no folder")
    files = [file for path in paths for file in recognise(path, options)]
    images = gather(files, report, by_file=by_file)
    if options.tags_column is not None and not any(image.tags for image in images):
        read = "; ".join(map(_described, files))
        raise UsageError(f"{read}: no image has tags in a column {options.tags_column!r}")
    if not images:
        raise CapcliError(f"{'; '.join(map(_described, files))}: there is no image in it")
    return images


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """A million objects are made here, and all stay: the collector would walk them over and over, for half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _described(file: Annotations) -> str:
    columns = f" with columns {', '.join(map(printable, file.columns[:20]))}" if file.columns else ""
    return f"{printable(file.path)}, read as {file.format}{columns}"
