"""Reads annotation files, splits their images for training, and checks that they can be decoded."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from capcli import pixels
from capcli.annotations.data_report import DataReport
from capcli.annotations.formats import recognise
from capcli.annotations.image_captions import GatheredImage, gather, usable
from capcli.annotations.rows import Annotations
from capcli.annotations.splits import Split, assign_splits, draw_validation, limited, marked, validation_images, without
from capcli.errors import CapcliError, UsageError
from capcli.loading import load, usable_cpus
from capcli.options import DECODE_TIMEOUT, MAX_PIXELS, DataOptions
from capcli.records import Annotated, Entry, Facts, Failure
from capcli.text import counted, printable

_MOST_WORKERS = 32


def read_annotations(
    paths: Sequence[str], options: DataOptions, *, locate: bool, report: DataReport
) -> Iterator[Annotated]:
    """Each image that the annotations at `paths` caption, in order of appearance, with all its captions.

    With `locate` each image's file is looked for, and one that is missing goes into the report; without it `image` is
    None and images are identified by name alone. A caption that one file repeats is kept (CIDEr counts how many
    annotators agree); one that a second file repeats is not. Of `options` only the columns and `image_root` are read.

    Raises UsageError where a given path or column does not exist, and CapcliError for a file that cannot be read, or
    where no image with a caption is left; both before the first image.
    """
    with garbage_collection_paused():
        images = _gathered(paths, options, report, by_file=locate)
        found = usable(images, options.image_root, report, locate=locate)
    report.count(found)
    return iter(found)


def read_split(options: DataOptions, *, locate: bool = True, keep_missing: bool = False) -> Split:
    """The images to train on and those to validate on; no image is in both.

    Validation images are those of `val_names`, `val_data` or `val_fraction`; without these options, those that the
    annotations mark (a split column, Karpathy's splits, folders of splits); else there are none. "test" is used for
    neither. An image in several splits, or in the data and in `val_data`, is not trained on. Without `locate` images are
    identified by name alone, as where names are URLs. With `keep_missing` images whose files are missing stay, unless all
    are missing.

    Raises UsageError where a path or column in `options` does not exist, and CapcliError as `read_annotations` does.
    """
    report = DataReport()
    with garbage_collection_paused():
        return _split(options, report, locate=locate, keep_missing=keep_missing)


def _split(options: DataOptions, report: DataReport, *, locate: bool, keep_missing: bool) -> Split:
    images = assign_splits(_gathered(options.data, options, report, by_file=locate), options, report)
    if not images:
        data = ", ".join(map(printable, options.data))
        raise CapcliError(f"{data}: no image is left to train or validate on: all are in the test split or in no list")
    found = usable(images, options.image_root, report, locate=locate, keep_missing=keep_missing)
    train = [image for image in found if image.split != "val"]
    val = [image for image in found if image.split == "val"]
    if options.val_data:
        candidates = validation_images(_gathered(options.val_data, options, report, by_file=locate))
        val = usable(candidates, options.image_root, report, locate=locate, keep_missing=keep_missing)
        train = without(train, val, report)
    elif options.val_fraction is not None:
        train, val = draw_validation(train, options.val_fraction, options.seed)
    train = list(marked(limited(train, options.train_limit, options.seed), "train"))
    val = list(marked(limited(val, options.val_limit, options.seed), "val"))
    report.count(train)
    report.count(val)
    return Split(train, val, report)


def _gathered(paths: Sequence[str], options: DataOptions, report: DataReport, *, by_file: bool) -> list[GatheredImage]:
    if not paths:
        raise UsageError("no data: name a file or folder of images with captions")
    if options.image_root is not None and not os.path.isdir(options.image_root):
        raise UsageError(f"--image-root {printable(options.image_root)} is not a folder")
    files = [file for path in paths for file in recognise(path, options)]
    images = gather(files, report, by_file=by_file)
    if options.tags_column is not None and not any(image.tags for image in images):
        raise UsageError(f"{'; '.join(map(_described, files))}: no image has tags in a column {options.tags_column!r}")
    if not images:
        raise CapcliError(f"{'; '.join(map(_described, files))}: it lists no image")
    return images


def _described(file: Annotations) -> str:
    columns = f" with columns {', '.join(map(printable, file.columns[:20]))}" if file.columns else ""
    return f"{printable(file.path)}, read as {file.format}{columns}"


@contextlib.contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """A context without the cyclic garbage collector, for the whole process; if it was off before, it stays off.

    Reading creates a million objects, none of which is garbage: the collector would traverse them repeatedly, which takes
    half of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_images(
    images: Sequence[Annotated],
    report: DataReport,
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    timeout: float = DECODE_TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
) -> list[Annotated]:
    """Decodes each image once and returns those that can be decoded, in order; the report gets the others as failures.

    `workers` processes decode (None: one per CPU; 0: this process), so that a codec that crashes, takes longer than
    `timeout` seconds or runs out of memory affects only its image. Images in datasets on disk are not checked. `progress`
    is called with the numbers of images done and in total. Raises CapcliError if no image can be decoded.
    """
    checked = [image for image in images if isinstance(image.image, str)]
    workers = min(usable_cpus(), _MOST_WORKERS) if workers is None else workers
    entries = (Entry(image.name, str(image.image)) for image in checked)
    broken: set[int] = set()
    first: Failure | None = None
    with load(entries, partial(decode, max_pixels=max_pixels), workers=workers, timeout=timeout) as results:
        for position, result in enumerate(results):
            if isinstance(result, Failure):
                first = first or result
                report.failures.append(result)
                broken.add(id(checked[position]))
            if progress is not None:
                progress(position + 1, len(checked))
    good = [image for image in images if id(image) not in broken]
    report.count((image for image in images if id(image) in broken), -1)
    if first is not None and not good:
        path = printable(str(checked[0].image))
        raise CapcliError(f"none of {counted(len(images), 'image')} can be decoded; the first, {path}: {first.message}")
    return good


def decode(path: str, *, max_pixels: int) -> tuple[npt.NDArray[np.uint8], Facts]:
    """Decodes the whole image and returns one black pixel, uint8 [1, 1, 3]: no pixels are sent back. Raises ImageError."""
    pixels.read(path, max_pixels=max_pixels)
    return np.zeros((1, 1, 3), np.uint8), {}
