"""What a decoder process makes of an image: a small upright RGB copy, encoded. Light to import."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from capcli import pixels
from capcli.errors import ImageError
from capcli.options.prepare import ImageFormat
from capcli.records import Stored
from capcli.sources.dataset_images import StoredImages

LONGEST_EDGE = {"jpeg": 65_500, "png": 1_000_000, "webp": 16_383}  # pixels, as the formats and their libraries allow
# JPEG 4:4:4: halving the colour's resolution saves a quarter of the bytes, and costs 4 dB in images this small.
SETTINGS: dict[str, dict[str, Any]] = {"jpeg": {"subsampling": 0}, "png": {}, "webp": {"method": 2}}


@dataclass(frozen=True)
class Encoder:
    """Reads an image where `address_of` says, and gives its copy's bytes uint8 [n], and its `width` and `height`.

    The shorter edge of the copy has `edge` pixels, or fewer where the image has fewer. EXIF, colour profiles and the
    like stay behind. Raises ImageError, and what encoding raises.
    """

    edge: int
    format: ImageFormat
    quality: int | None
    max_pixels: int
    _stored: StoredImages = field(default_factory=StoredImages)

    def __call__(self, address: str) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
        image, _ = pixels.read(self._find(address), max_pixels=self.max_pixels)
        copy = shrink(image, self.edge)
        if max(copy.size) > LONGEST_EDGE[self.format]:
            raise ImageError("shape", f"{copy.width}x{copy.height} is too long and thin for {self.format.upper()}")
        copy.info = {}  # encoders take EXIF, profiles and comments from there
        file = io.BytesIO()
        quality = {} if self.quality is None else {"quality": self.quality}
        copy.save(file, self.format, **quality, **SETTINGS[self.format])
        return np.frombuffer(file.getbuffer(), np.uint8), {"width": copy.width, "height": copy.height}

    def _find(self, address: str) -> str | bytes:
        """The path of a file, or its bytes."""
        if not address.startswith("\0"):
            return address
        match json.loads(address[1:]):
            case [str(folder), int(row), str(column)]:
                return self._stored.read(Stored(folder, row, column))
            case {"error": str(kind), "message": str(message)}:
                raise ImageError(kind, message)
        raise ImageError("missing", "no image has such an address")


def address_of(image: str | Stored | ImageError) -> str:
    """Where an image is, in one text: a path, or, after a NUL, a row of a dataset or why there is no image."""
    if isinstance(image, str):
        return os.path.abspath(image)
    if isinstance(image, Stored):
        return "\0" + json.dumps([os.path.abspath(image.folder), image.row, image.column])
    return "\0" + json.dumps({"error": image.kind, "message": str(image)})


def shrink(image: Image.Image, edge: int) -> Image.Image:
    """The image with its shorter edge at `edge` pixels; never enlarged, its aspect kept."""
    scale = edge / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(edge, round(length * scale)) for length in image.size)
    # The sharpest filter there is: training resizes the copy once more, and softens it once more. The gap lets large photos
    # be averaged to three times the size first, which takes a fifth of the time and is beyond what the eye or JPEG tells.
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
