"""Bytes -> oriented RGB -> pixels, with the processor's arithmetic to the bit.

Runs in light decoder processes: the standard library, NumPy and Pillow, and pillow-heif once a file asks for it.
Pillow's limits and warnings are the process's, so one image at a time is decoded here: more cores want more processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Collection, Iterator
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from capcli.errors import ImageError
from capcli.pixels.opening import Stream, identify, open_image
from capcli.pixels.processor import BICUBIC, PixelSpec
from capcli.pixels.rgb import array_rgb, stands, upright, upright_rgb
from capcli.records import FACTS

__all__ = [
    "FACTS",
    "PixelSpec",
    "columns_first",
    "from_array",
    "load",
    "load_or_keep",
    "read",
    "resize",
    "to_rgb",
    "window",
]

WHOLE_RESIZE = 1 << 24  # pixels of a resized image up to which it is made whole before it is cropped
LONGEST_EDGE = 1 << 21  # of a resized image; Pillow's filter table alone takes some 50 bytes for each of its pixels
LARGEST_OUTPUT = 1 << 26  # pixels of a resized image that is not cropped
LARGEST_KEPT = 1 << 25  # pixels of a JPEG that is left to a GPU
SPARE = 2  # times the edges of the resized image that a shrunk one keeps, for the filter to choose from

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Python prints what plugins log about damaged files
_one_at_a_time = threading.RLock()


def load(
    source: str | bytes, spec: PixelSpec, *, max_pixels: int, facts: Collection[str] = (), fast: bool = False
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """`read`, then `resize`: the pixels uint8 [height, width, 3] of the image, and its `facts`.

    `source` is a file's path, or the bytes of one. `fast` lets libjpeg decode a large JPEG at a half, a quarter or an
    eighth of its size: sooner, and the pixels are a little other ones.

    Raises:
        ImageError: whatever went wrong, in decoding or in memory.
    """
    with _failures():
        image, found = read(source, max_pixels=max_pixels, facts=facts, shrink_for=spec if fast else None)
        return resize(image, spec), found


def load_or_keep(
    source: str | bytes, spec: PixelSpec, *, max_pixels: int, facts: Collection[str] = ()
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """`load`, but for plain JPEGs: of these the bytes of the file, uint8 [n], for a GPU to decode.

    Raises:
        ImageError: as `load`; a plain JPEG's header is all that was looked at.
    """
    with _failures():
        with open_image(source) as stream, _pillow_limits(max_pixels):
            image = identify(stream)
            data = stream.getvalue() if isinstance(stream, io.BytesIO) else b""
            if is_plain_jpeg(image, data):
                _refuse_large(image.size, max_pixels)
                height, width = spec.resized(image.height, image.width)
                _refuse_shape(image, (width, height), cropped=spec.crop is not None)
                found = _file_facts(stream, image, facts) | {"width": image.width, "height": image.height}
                return np.frombuffer(data, np.uint8).copy(), {name: found[name] for name in facts}
        return load(data or source, spec, max_pixels=max_pixels, facts=facts)


def is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether a decoder can be told nothing but this file: upright YCbCr, whole, of a size that many of fit a GPU.

    Not progressive: their scans may be thousands, and a process can be ended that goes through them.
    """
    return (
        type(image) is JpegImageFile
        and image.mode == "RGB"
        and [component[0] for component in image.layer] == [1, 2, 3]  # others may stand for other colours
        and image.info.get("adobe_transform", 1) == 1
        and not image.info.get("progressive")
        and image.width * image.height <= LARGEST_KEPT
        and upright(image)
        and data.endswith(b"\xff\xd9")
    )


def read(
    source: str | bytes, *, max_pixels: int, facts: Collection[str] = (), shrink_for: PixelSpec | None = None
) -> tuple[Image.Image, dict[str, str | int]]:
    """Open an image, by its path or its file's bytes: upright RGB, the first frame of several; and the `FACTS` asked for.

    Width and height are those of the upright image; format and mode are Pillow's names for what the file holds. An
    image of more than `max_pixels` is refused before it is decoded. With `shrink_for` a JPEG may come smaller, but no
    smaller than SPARE times what that processor resizes it to.

    Raises:
        ImageError: it is no regular file, no image, truncated, too large, or anything else was wrong with it.
    """
    with _failures(), open_image(source) as stream, _pillow_limits(max_pixels):
        image = identify(stream)
        _refuse_large(image.size, max_pixels)
        found = _file_facts(stream, image, facts)
        whole = None if shrink_for is None else shrink(image, shrink_for)
        rgb = upright_rgb(image)
        _refuse_large(rgb.size, max_pixels)  # some containers hold other sizes than their headers say
        width, height = whole or rgb.size
        found |= {"width": width, "height": height}
        return rgb, {name: found[name] for name in facts}


def _file_facts(stream: Stream, image: Image.Image, facts: Collection[str]) -> dict[str, str | int]:
    """What is known of an image before it is decoded; `stream` stands afterwards where it stood."""
    found: dict[str, str | int] = {"format": image.format or "", "mode": image.mode}
    before = stream.tell()
    if "sha256" in facts:
        stream.seek(0)
        found["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    found["bytes"] = stream.seek(0, os.SEEK_END)
    stream.seek(before)
    return found


def shrink(image: Image.Image, spec: PixelSpec) -> tuple[int, int] | None:
    """Lets libjpeg decode at a part of the size; width and height of the whole upright image, None where nothing changes.

    The scaling happens in its discrete cosine transform (Pillow's `draft`), of which most of the time goes.
    """
    if not isinstance(image, JpegImageFile):
        return None
    upright = stands(image)
    width, height = image.size if upright else image.size[::-1]
    rows, columns = spec.resized(height, width)
    wanted = (SPARE * columns, SPARE * rows)
    before = image.size
    image.draft(None, wanted if upright else wanted[::-1])
    return None if image.size == before else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB; the image itself where it is that already.

    Raises:
        ImageError: it is empty, or cannot be decoded or converted.
    """
    if 0 in image.size:
        raise ImageError("unreadable", f"an image of {image.width}x{image.height} pixels is empty")
    with _failures(), _pillow_limits(None):
        return upright_rgb(image)


def from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    """RGB from [height, width] or [height, width, 1 | 3 | 4]: uint8, uint16, bool, or floats from 0 to 1.

    Raises:
        ImageError: another shape or dtype, an empty array, or floats outside 0 to 1.
    """
    with _failures():
        return array_rgb(array)


def resize(image: Image.Image, spec: PixelSpec) -> npt.NDArray[np.uint8]:
    """Resize and crop an RGB image as the processor does: uint8 [height, width, 3], C-contiguous and writable.

    The result equals transformers' PIL backend to the bit. Of an image so long that resizing it whole would take much
    memory, only what the crop keeps is made.

    Raises:
        ImageError: a shape whose resized image has an empty edge, or one above `LONGEST_EDGE` or `LARGEST_OUTPUT`; or
            not enough memory.
    """
    height, width = spec.resized(image.height, image.width)
    crop_height, crop_width = spec.crop or (height, width)
    _refuse_shape(image, (width, height), cropped=spec.crop is not None)
    top, rows, above = window(height, crop_height)
    left, columns, before = window(width, crop_width)
    with _failures():
        part = _resized_part(image, (width, height), (left, top, left + columns, top + rows), spec.resample)
    if part.size == (crop_width, crop_height):
        return np.array(part)
    pixels = np.zeros((crop_height, crop_width, 3), np.uint8)
    pixels[above : above + rows, before : before + columns] = np.asarray(part)
    return pixels


def window(length: int, crop: int) -> tuple[int, int, int]:
    """Of a centred crop along one edge: where it begins in the image, what it takes, where that begins in the crop."""
    if length >= crop:
        return (length - crop) // 2, crop, 0
    return 0, length, (crop - length + 1) // 2


def _resized_part(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int], resample: int
) -> Image.Image:
    """`image.resize(size, resample).crop(box)`, to the bit, in bounded memory.

    Pillow resizes along the rows, rounds to bytes, then along the columns by the same arithmetic (or the other way round,
    `columns_first`), each row and column by itself: so both passes can be made of strips. (Its own `box` shifts the
    filter by a rounded fraction: not exact.)
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
    return height > rows and height - rows > 2 * (width - columns) and _knows_columns_first()


@cache
def _knows_columns_first() -> bool:
    grain = Image.effect_noise((40, 200), 100)
    return (
        grain.resize((32, 32), BICUBIC).tobytes() == grain.resize((40, 32), BICUBIC).resize((32, 32), BICUBIC).tobytes()
    )


def _resized_columns(image: Image.Image, width: int, left: int, right: int, resample: int) -> Image.Image:
    """Columns `left` to `right` of the image resized to `width` and its own height, made a few rows at a time."""
    columns = Image.new("RGB", (right - left, image.height))
    step = max(1, WHOLE_RESIZE // width)
    for above in range(0, image.height, step):
        below = min(above + step, image.height)
        strip = image.crop((0, above, image.width, below)).resize((width, below - above), Image.Resampling(resample))
        columns.paste(strip.crop((left, 0, right, below - above)), (0, above))
    return columns


def _refuse_shape(image: Image.Image, resized: tuple[int, int], *, cropped: bool) -> None:
    width, height = resized
    if min(resized) < 1:
        reason = "one edge would vanish"
    elif resized == image.size:
        return
    elif max(resized) > LONGEST_EDGE:
        reason = f"an edge would pass {LONGEST_EDGE} pixels"
    elif not cropped and width * height > LARGEST_OUTPUT:
        reason = f"it would pass {LARGEST_OUTPUT} pixels"
    else:
        return
    shape = f"{image.width}x{image.height} is too long and thin for this model"
    raise ImageError("shape", f"{shape}: resized to {width}x{height} {reason}; cut it into pieces")


def _refuse_large(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _too_large(f"{size[0]}x{size[1]}", max_pixels)


def _too_large(what: str, max_pixels: int | None) -> ImageError:
    return ImageError("too-large", f"{what} pixels are more than the limit of {max_pixels}; --max-pixels allows more")


@contextlib.contextmanager
def _pillow_limits(max_pixels: int | None) -> Iterator[None]:
    """Set what Pillow keeps for the whole process, and put it back.

    Pillow refuses by `max_pixels` at places that only it can see (an icon's inner image, a frame that outgrows its
    GIF), truncation fails even where the embedding program allows it, and no warning is shown or raised.
    """
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(pixels[0] if pixels else "its", max_pixels) from error
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Whatever decoding raises, Pillow's own and what its plugins let through, becomes an ImageError."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out-of-memory", "there was not enough memory to decode it") from error
    except Exception as error:
        raise ImageError("unreadable", f"it cannot be decoded: {_one_line(error)}") from error


def _one_line(text: object) -> str:
    """A message for people: no line breaks, no addresses of objects, not without end."""
    line = " ".join(re.sub(r"<[^<>]*\bat 0x[0-9a-fA-F]+>", "the file", str(text)).split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable[:200] or type(text).__name__
