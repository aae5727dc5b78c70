"""Encodes images in decoder processes: small upright RGB copies. Cheap to import."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from capcli import pixels
from capcli.options.prepare import ImageFormat
from capcli.pixels.copies import encode
from capcli.sources.dataset_images import StoredImages


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
        return encode(copy, self.format, self.quality), {"width": copy.width, "height": copy.height}


def shrink(image: Image.Image, edge: int) -> Image.Image:
    """The image with its shorter edge at `edge` pixels and its aspect ratio kept; never enlarged."""
    scale = edge / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(edge, round(length * scale)) for length in image.size)
    # The sharpest filter: training resizes the copy again, which softens it again. With reducing_gap large photos are
    # first averaged to three times the size, which takes a fifth of the time and makes no visible difference.
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
