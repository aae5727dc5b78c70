"""RGB image -> pixels: resized and cropped bit-identically to the image processor, in bounded memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from capcli.errors import ImageError
from capcli.pixels.guards import image_errors
from capcli.pixels.processor import BICUBIC, Canvas, PixelSpec

WHOLE_RESIZE = 1 << 24  # pixels of a resized image up to which it is resized whole before the crop
LONGEST_EDGE = 1 << 21  # of a resized image; Pillow's filter table takes about 50 bytes for each pixel of an edge
LARGEST_OUTPUT = 1 << 26  # pixels of a resized image that is not cropped


def resize(image: Image.Image, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    """Resize and crop an RGB image as the processor does: uint8 [height, width, 3], C-contiguous and writable.

    The result is bit-identical to transformers' PIL backend. Of an image whose whole resized version would take much
    memory, only the part inside the crop is computed.

    Raises:
        ImageError: a shape whose resized image has an empty edge, or exceeds `LONGEST_EDGE` or `LARGEST_OUTPUT`; or
            not enough memory.
    """
    if spec.canvas is not None:
        return resize(_on_page(image, spec, spec.canvas), replace(spec, rule="keep", canvas=None))
    height, width = spec.resized(image.height, image.width)
    crop_height, crop_width = spec.crop or (height, width)
    refuse_shape(image, (width, height), cropped=spec.crop is not None)
    top, rows, above = window(height, crop_height)
    left, columns, before = window(width, crop_width)
    with image_errors():
        part = _resized_part(image, (width, height), (left, top, left + columns, top + rows), spec.resample)
    if part.size == (crop_width, crop_height):
        return np.array(part)
    pixels = np.zeros((crop_height, crop_width, 3), np.uint8)
    pixels[above : above + rows, before : before + columns] = np.asarray(part)
    return pixels


def _on_page(image: Image.Image, spec: PixelSpec, canvas: Canvas) -> Image.Image:
    """An image turned, resized and padded as Donut does; raises ImageError as `resize` does."""
    if canvas.turns(image.height, image.width):
        image = image.transpose(Image.Transpose.ROTATE_270)
    image = _resized_whole(image, spec.resized(image.height, image.width), spec.resample)
    image = _resized_whole(image, canvas.reduced(image.height, image.width), spec.resample or BICUBIC)
    if not canvas.pad:
        return image
    height, width = canvas.size
    if image.height > height or image.width > width:
        raise ImageError("shape", f"{image.width}x{image.height} does not fit into the {width}x{height} of this model")
    page = Image.new("RGB", (width, height))
    page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return page


def _resized_whole(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """An image resized to `size` (height, width); raises ImageError for a shape that `refuse_shape` refuses."""
    height, width = size
    refuse_shape(image, (width, height), cropped=False)
    with image_errors():
        return image.resize((width, height), Image.Resampling(resample))


def window(length: int, crop: int) -> tuple[int, int, int]:
    """A centred crop along one edge: its start in the image, how many pixels it takes, and their start in the crop."""
    if length >= crop:
        return (length - crop) // 2, crop, 0
    return 0, length, (crop - length + 1) // 2


def refuse_shape(image: Image.Image, resized: tuple[int, int], *, cropped: bool) -> None:
    """Raises ImageError where an image's resized size (width, height) is empty or too large."""
    width, height = resized
    if min(resized) < 1:
        reason = "one edge would vanish"
    elif resized == image.size:
        return
    elif max(resized) > LONGEST_EDGE:
        reason = f"an edge would exceed {LONGEST_EDGE} pixels"
    elif not cropped and width * height > LARGEST_OUTPUT:
        reason = f"it would exceed {LARGEST_OUTPUT} pixels"
    else:
        return
    shape = f"{image.width}x{image.height} is too long and thin for this model"
    raise ImageError("shape", f"{shape}: resized to {width}x{height} {reason}; cut it into pieces")


def _resized_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, bit for bit, in bounded memory.

    Pillow resizes along the rows, rounds to bytes, then resizes along the columns by the same arithmetic (or columns
    first, see `columns_first`). Each row and column is independent, so both passes can be computed in strips. Pillow's own
    `box` argument shifts the filter by a rounded fraction and is not exact.
    """
    width, height = size
    left, top, right, bottom = box
    if width * height <= WHOLE_RESIZE or box == (0, 0, width, height):
        whole = image.resize(size, Image.Resampling(resample))
        return whole if box == (0, 0, width, height) else whole.crop(box)
    if columns_first(image.size, size):
        turned = image.transpose(Image.Transpose.TRANSPOSE)
        tall = _resized_columns(turned, height, top, bottom, resample).transpose(Image.Transpose.TRANSPOSE)
        return _resized_columns(tall, width, left, right, resample)
    wide = _resized_columns(image, width, left, right, resample).transpose(Image.Transpose.TRANSPOSE)
    return _resized_columns(wide, height, top, bottom, resample).transpose(Image.Transpose.TRANSPOSE)


def columns_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether Pillow resizes an image along its columns before its rows; sizes are (width, height).

    Pillow 13 does where the height shrinks by more than twice what the width does (python-pillow, pull request 9549).
    """
    (width, height), (columns, rows) = size, resized
    return height > rows and height - rows > 2 * (width - columns) and _pillow_chooses_order()


@cache
def _pillow_chooses_order() -> bool:
    noise = Image.effect_noise((40, 200), 100)
    in_two_passes = noise.resize((40, 32), BICUBIC).resize((32, 32), BICUBIC)
    return noise.resize((32, 32), BICUBIC).tobytes() == in_two_passes.tobytes()


def _resized_columns(image: Image.Image, width: int, left: int, right: int, resample: int) -> Image.Image:
    """Columns `left` to `right` of the image resized to `width` and its own height, computed a few rows at a time."""
    columns = Image.new("RGB", (right - left, image.height))
    step = max(1, WHOLE_RESIZE // width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        strip = image.crop((0, top, image.width, bottom)).resize((width, bottom - top), Image.Resampling(resample))
        columns.paste(strip.crop((left, 0, right, bottom - top)), (0, top))
    return columns
