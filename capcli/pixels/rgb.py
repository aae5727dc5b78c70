"""Every mode to RGB: upright, transparency over white, 16 bits scaled."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from capcli.errors import ImageError

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC, BITS_PER_SAMPLE, WHITE_IS_ZERO = 262, 258, 0  # TIFF tags, and a value of the first


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode `image` and make it RGB, turned as its EXIF (or XMP) orientation says.

    An RGB image that stands upright is returned as it is, not copied. Raises whatever Pillow raises.
    """
    with _silent_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()  # before the orientation is asked for: Pillow turns a TIFF as it loads it, and forgets the tag
    method = TRANSPOSITIONS.get(_orientation(image))
    rgb = _rgb(image)
    if method is None:
        return rgb
    upright = rgb.transpose(method)
    upright.info = {}  # which still says how to turn it
    return upright


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    """libtiff writes what it finds wrong to descriptor 2, past Python, besides failing as it should."""
    try:
        before = os.dup(2)
    except OSError:  # there is no standard error to keep clean
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def array_rgb(array: Array) -> Image.Image:
    """Make RGB of an array [height, width], or [height, width, 1 | 3 | 4] with a fourth channel of transparency.

    uint8 as it is, uint16 by its high byte, bool as black and white, floats from 0 to 1.

    Raises:
        ImageError: another shape or dtype, an empty array, or floats outside 0 to 1.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError("unreadable", f"an array of shape {list(array.shape)} is no image: [height, width, 3] is one")
    return _rgb(Image.fromarray(np.ascontiguousarray(_eight_bits(array))))


def _eight_bits(array: Array) -> Bytes:
    if array.dtype == np.uint8:
        return np.asarray(array, np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.newbyteorder("=") == np.uint16:
        return (array >> 8).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        floats = array.astype(np.float32, copy=False)
        if not (floats.min() >= 0 and floats.max() <= 1):  # so that NaN fails too
            raise ImageError("unreadable", "an array of floats must lie between 0 and 1")
        return _rounded(floats * np.float32(255))
    raise ImageError(
        "unreadable", f"an array of {array.dtype} is no image: uint8, uint16, bool or float from 0 to 1 is"
    )


def upright(image: Image.Image) -> bool:
    """Whether it is to be seen as it lies in its file."""
    return _orientation(image) not in TRANSPOSITIONS


def stands(image: Image.Image) -> bool:
    """Whether it keeps its width and height when it is turned upright."""
    return _orientation(image) not in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # EXIF that cannot be parsed says nothing about the picture: it stays as it is
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _from_16_bits(image)
    elif image.mode == "I":
        image = _from_integers(image)
    elif image.mode == "F":
        image = _from_floats(image)
    if image.has_transparency_data:
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """Composite as transformers' `convert_to_rgb` does, to the bit."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # a 16-bit PNG: Pillow keeps the high bytes of its samples, but all of this colour's
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """High bytes, which is what Pillow makes of 16-bit colour: grey and colour of one picture come out the same."""
    array = np.asarray(image)  # uint16 [height, width], in the byte order of its mode
    tags = getattr(image, "tag_v2", {})
    shift = 4 if tags.get(BITS_PER_SAMPLE) == (12,) else 8
    grey = (array >> shift).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = np.uint8(255) - grey
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(array == transparent, 0, 255).astype(np.uint8)], axis=-1))


def _from_integers(image: Image.Image) -> Image.Image:
    """32-bit integers carry no scale: up to 255 they are taken as 8 bits, up to 65535 as 16, and others are stretched.

    A portable graymap is the exception: Pillow has scaled it to 16 bits, however dark it is.
    """
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        return Image.fromarray(_stretched(array))
    shift = 8 if high > 255 or image.format == "PPM" else 0
    return Image.fromarray((array >> shift).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    """Floats from 0 to 1 are scaled, whole numbers up to 255 are taken as 8 bits, and others are stretched.

    NaN is black; infinities are the ends of the scale.
    """
    array = np.asarray(image)
    finite = array[np.isfinite(array)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whole = np.nan_to_num(array, nan=low if low < 0 else 0.0, posinf=high, neginf=low)
    if finite.size == 0 or (low >= 0 and high <= 1):
        whole = np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0)
        return Image.fromarray(_rounded(whole * np.float32(255)))
    if low >= 0 and high <= 255 and bool((finite == np.rint(finite)).all()):
        return Image.fromarray(whole.astype(np.uint8))
    return Image.fromarray(_stretched(whole))


def _stretched(array: Array) -> Bytes:
    """The smallest value black, the largest white."""
    values = array.astype(np.float64)
    low, high = values.min(), values.max()
    return _rounded((values - low) * (255 / ((high - low) or 1)))


def _rounded(array: Array) -> Bytes:
    return np.asarray(np.rint(array), np.uint8)
