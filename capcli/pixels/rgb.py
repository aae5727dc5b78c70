"""Images of every Pillow mode to upright RGB: transparency over white, 16 bits scaled to 8."""

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
DEPTHS = (8, 10, 12, 14, 16)  # bits of sensors and scanners, whose values are stored in 16 bits as they are
PHOTOMETRIC, BITS_PER_SAMPLE, WHITE_IS_ZERO = 262, 258, 0  # TIFF tags, and a value of the first


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode `image`, convert it to RGB and apply its EXIF (or XMP) orientation.

    An upright RGB image is returned itself, not copied. Raises whatever Pillow raises.
    """
    with _silent_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
        image.load()  # before the orientation is read: Pillow rotates a TIFF as it loads it, and drops the tag
    method = TRANSPOSITIONS.get(_orientation(image))
    rgb = _rgb(image)
    if method is None:
        return rgb
    upright = rgb.transpose(method)
    upright.info = {}  # it still has the orientation
    return upright


@contextlib.contextmanager
def _silent_libtiff() -> Iterator[None]:
    """libtiff prints errors to file descriptor 2 in addition to reporting them: discard this output."""
    try:
        before = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def array_rgb(array: Array) -> Image.Image:
    """RGB from an array [height, width] or [height, width, 1 | 3 | 4], where a fourth channel is alpha.

    uint8 is kept, uint16 is reduced to the high bits of its depth, bool is black and white, floats are from 0 to 1.

    Raises:
        ImageError: another shape or dtype, an empty array, or floats outside 0 to 1.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(
            "unreadable", f"an array of shape {list(array.shape)} is not an image: it must be [height, width, 3]"
        )
    return _rgb(Image.fromarray(np.ascontiguousarray(_eight_bits(array))))


def _eight_bits(array: Array) -> Bytes:
    if array.dtype == np.uint8:
        return np.asarray(array, np.uint8)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.newbyteorder("=") == np.uint16:
        return (array >> _surplus_bits(array)).astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating):
        floats = array.astype(np.float32, copy=False)
        if not (floats.min() >= 0 and floats.max() <= 1):  # NaN fails as well
            raise ImageError("unreadable", "an array of floats must have values between 0 and 1")
        return _rounded(floats * np.float32(255))
    raise ImageError(
        "unreadable", f"an array of {array.dtype} is not an image: it must be uint8, uint16, bool, or float from 0 to 1"
    )


def is_upright(image: Image.Image) -> bool:
    """Whether its orientation changes nothing."""
    return _orientation(image) not in TRANSPOSITIONS


def keeps_shape(image: Image.Image) -> bool:
    """Whether its orientation keeps width and height."""
    return _orientation(image) not in (5, 6, 7, 8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # EXIF that cannot be parsed is ignored
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
    """Composite bit-identically to transformers' `convert_to_rgb`."""
    transparent = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # a 16-bit PNG: Pillow reduces its samples to their high bytes, but not this colour
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """The high bits of the depth: of 16 bits the high byte, as Pillow reduces colour, so that grey and colour agree."""
    array = np.asarray(image)  # uint16 [height, width], in the byte order of its mode
    tags = getattr(image, "tag_v2", {})
    shift = 4 if tags.get(BITS_PER_SAMPLE) == (12,) else _surplus_bits(array)
    grey = (array >> shift).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = np.uint8(255) - grey
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.stack([grey, np.where(array == transparent, 0, 255).astype(np.uint8)], axis=-1))


def _surplus_bits(array: Array) -> int:
    """The low bits to drop from values of up to 16 bits to keep 8.

    The file does not say how many bits are used, and 12 bits read as 16 would be black. So the depth is the smallest of
    `DEPTHS` that holds the largest value.
    """
    bits = int(array.max()).bit_length()
    return next(depth for depth in DEPTHS if bits <= depth) - 8


def _from_integers(image: Image.Image) -> Image.Image:
    """32-bit integers have no known scale: those of up to 16 bits are read as such, and others are stretched.

    A portable graymap is the exception: Pillow has scaled it to 16 bits already.
    """
    array = np.asarray(image)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > 65535:
        return Image.fromarray(_stretched(array))
    shift = 8 if image.format == "PPM" else _surplus_bits(array)
    return Image.fromarray((array >> shift).astype(np.uint8))


def _from_floats(image: Image.Image) -> Image.Image:
    """Floats from 0 to 1 are scaled, whole numbers up to 255 are 8 bits, and others are stretched.

    NaN becomes black; infinities become the ends of the scale.
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
    """Scaled so that the smallest value is black and the largest white."""
    values = array.astype(np.float64)
    low, high = values.min(), values.max()
    return _rounded((values - low) * (255 / ((high - low) or 1)))


def _rounded(array: Array) -> Bytes:
    return np.asarray(np.rint(array), np.uint8)
