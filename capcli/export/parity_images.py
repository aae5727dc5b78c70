"""The images of a parity check: those of a folder, or generated ones."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from capcli import pixels
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.export.parity import Pixels
from capcli.options import MAX_PIXELS, ExportOptions, SourceOptions
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.sources import open_source

MAX_IMAGES = 64  # of a folder
DRAWN = 16


def image_paths(options: ExportOptions) -> list[str]:
    """The first MAX_IMAGES images of `--verify-with`; empty without it. Raises UsageError where it has none."""
    if options.verify_with is None:
        return []
    source = open_source(SourceOptions(sources=(options.verify_with,)), warn, None)
    paths = [entry.path for entry in islice(source, MAX_IMAGES)]
    if not paths:
        raise UsageError(f"--verify-with {options.verify_with}: there is no image")
    return paths


def load_images(paths: list[str], spec: PixelSpec, size: tuple[int, int]) -> list[Pixels]:
    """The images as preprocessed by the captioner's processor; unusable ones are skipped. Raises CapcliError if all are."""
    images = list(usable(paths, spec, size))
    if not images:
        raise CapcliError("--verify-with: none of its images can be used")
    return images


def usable(paths: list[str], spec: PixelSpec, size: tuple[int, int]) -> Iterator[Pixels]:
    for path in paths:
        try:
            image = pixels.load(path, spec, max_pixels=MAX_PIXELS)[0]
        except ImageError as error:
            warn(f"--verify-with: {path} is skipped: {error}")
            continue
        if image.shape[:2] == size:
            yield image
        else:
            warn(f"--verify-with: {path} is skipped: its size after preprocessing is not that of the encoder")


def draw_images(size: tuple[int, int], count: int = DRAWN) -> list[Pixels]:
    """Images that differ from each other, always the same ones: coarse colour fields with a disc and a bar on them."""
    height, width = size
    rows, columns = np.mgrid[0:height, 0:width]
    images = []
    for number in range(count):
        rng = np.random.default_rng(number)
        grain = 2 + number % 7
        field = rng.uniform(0, 255, (grain, grain, 3))
        picture = field[rows * grain // height, columns * grain // width]
        picture += rng.normal(0, 4 * (number % 4), picture.shape)
        y, x, radius = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.3) * width
        picture[(rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(0, 255, 3)
        bar = int(rng.uniform(0, 0.9) * width)
        picture[:, bar : bar + width // 12 + 1] = rng.uniform(0, 255, 3)
        images.append(picture.clip(0, 255).astype(np.uint8))
    return images
