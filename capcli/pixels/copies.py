"""Images encoded again, to be stored or sent: without EXIF data, colour profiles and comments."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from capcli.errors import ImageError
from capcli.pixels.guards import image_errors
from capcli.pixels.reading import read, within

JPEG_QUALITY = 95
LONGEST_EDGE = {"jpeg": 65_500, "png": 1_000_000, "webp": 16_383}  # pixels; limits of the formats and their libraries
# JPEG 4:4:4: halving the resolution of colour saves a quarter of the bytes, and costs 4 dB in small images.
SETTINGS: dict[str, dict[str, Any]] = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {"method": 2}}


def load_jpeg(
    source: str | bytes, *, max_pixels: int, max_edge: int | None, facts: Collection[str] = ()
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """The upright image as the bytes of a JPEG file, uint8 [n], and the `facts` of the original.

    `source` is a file's path, or the bytes of a file. The longest edge has at most `max_edge` pixels (None: as it is); no
    image is enlarged.

    Raises:
        ImageError: any error of decoding or memory; `shape` where JPEG cannot contain an image so long.
    """
    with image_errors():
        image, found = read(source, max_pixels=max_pixels, facts=facts)
        return encode(within(image, max_edge), "jpeg", JPEG_QUALITY), found


def encode(image: Image.Image, format_name: str, quality: int | None) -> npt.NDArray[np.uint8]:
    """The bytes of the image in a file, uint8 [n].

    Raises ImageError for an image that is too long for the format, and what Pillow's encoder raises.
    """
    if max(image.size) > LONGEST_EDGE[format_name]:
        raise ImageError("shape", f"{image.width}x{image.height} is too long and thin for {format_name.upper()}")
    image.info = {}  # encoders take EXIF, profiles and comments from there
    file = io.BytesIO()
    given = {} if quality is None else {"quality": quality}
    image.save(file, format_name, **given, **SETTINGS[format_name])
    return np.frombuffer(file.getbuffer(), np.uint8)
