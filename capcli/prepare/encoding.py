"""Encodes images in decoder processes: small upright RGB copies. Cheap to import."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from capcli import pixels
from capcli.errors import ImageError
from capcli.options.prepare import ImageFormat
from capcli.sources.dataset_images import StoredImages

LONGEST_EDGE = {"jpeg": 65_500, "png": 1_000_000, "webp": 16_383}  # pixels; limits of the formats and their libraries
# JPEG 4:4:4: halving the resolution of colour saves a quarter of the bytes, and costs 4 dB in images this small.
SETTINGS: dict[str, dict[str, Any]] = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {"method": 2}}


@dataclass(frozen=True)
class Encoder:
    """Reads the image at an address (see `address_of`); returns the bytes of its copy, uint8 [n], and its `width` and `height`.

    The shorter edge of the copy has `edge` pixels, or fewer if the image has fewer. EXIF data, colour profiles and
    comments are left out. Raises ImageError, and what Pillow's encoder raises.
    """

    edge: int
    format: ImageFormat
    quality: int | None
    max_pixels: int
    _stored: StoredImages = field(default_factory=StoredImages)

    def __call__(self, address: str) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
        image, _ = pixels.read(self._stored.find(address), max_pixels=self.max_pixels)
        copy = shrink(image, self.edge)
        if max(copy.size) > LONGEST_EDGE[self.format]:
            raise ImageError("shape", f"{copy.width}x{copy.height} is too long and thin for {self.format.upper()}")
        copy.info = {}  # encoders take EXIF, profiles and comments from there
        file = io.BytesIO()
        quality = {} if self.quality is None else {"quality": self.quality}
        copy.save(file, self.format, **quality, **SETTINGS[self.format])
        return np.frombuffer(file.getbuffer(), np.uint8), {"width": copy.width, "height": copy.height}


def shrink(image: Image.Image, edge: int) -> Image.Image:
    """The image with its shorter edge at `edge` pixels and its aspect ratio kept; never enlarged."""
    scale = edge / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(edge, round(length * scale)) for length in image.size)
    # The sharpest filter: training resizes the copy again, which softens it again. With reducing_gap large photos are
    # first averaged to three times the size, which takes a fifth of the time and makes no visible difference.
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
