"""Every image decoded once, before anything is trained on: what is broken is found and left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from capcli import pixels
from capcli.annotations.data_report import DataReport
from capcli.errors import CapcliError
from capcli.loading import load, usable_cpus
from capcli.options import DECODE_TIMEOUT, MAX_PIXELS
from capcli.records import Annotated, Entry, Facts, Failure
from capcli.text import counted, printable

_MOST_WORKERS = 32


def check_images(
    images: Sequence[Annotated],
    report: DataReport,
    *,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    timeout: float = DECODE_TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
) -> list[Annotated]:
    """The images that can be decoded, in their order; the others become failures in the report, out of its counts.

    Decoding is done in `workers` processes (None: one per CPU; 0: in this one), so that a codec that crashes, hangs for
    `timeout` seconds or swells costs its image. An image in a dataset on disk is taken as good. `progress` hears how
    many of how many are done. Raises CapcliError where none is left.
    """
    looked_at = [image for image in images if isinstance(image.image, str)]
    workers = min(usable_cpus(), _MOST_WORKERS) if workers is None else workers
    entries = (Entry(image.name, str(image.image)) for image in looked_at)
    broken: set[int] = set()
    first: Failure | None = None
    with load(entries, partial(decoded, max_pixels=max_pixels), workers=workers, timeout=timeout) as results:
        for position, result in enumerate(results):
            if isinstance(result, Failure):
                first = first or result
                report.failures.append(result)
                broken.add(id(looked_at[position]))
            if progress is not None:
                progress(position + 1, len(looked_at))
    good = [image for image in images if id(image) not in broken]
    report.count((image for image in images if id(image) in broken), -1)
    if first is not None and not good:
        path = printable(str(looked_at[0].image))
        raise CapcliError(
            f"none of {counted(len(images), 'image')} can be decoded; of the first, {path}: {first.message}"
        )
    return good


def decoded(path: str, *, max_pixels: int) -> tuple[npt.NDArray[np.uint8], Facts]:
    """Decodes all of the image, and sends no more than one pixel to whoever asked. Raises ImageError."""
    pixels.read(path, max_pixels=max_pixels)
    return np.zeros((1, 1, 3), np.uint8), {}
