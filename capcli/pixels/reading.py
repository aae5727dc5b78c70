"""Files and their bytes to upright RGB images and to pixels, with facts about the file."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Collection

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from capcli.errors import ImageError
from capcli.pixels.guards import image_errors, pillow_limits, refuse_large
from capcli.pixels.opening import Stream, identify, open_image
from capcli.pixels.processor import PixelSpec
from capcli.pixels.resizing import refuse_shape, resize
from capcli.pixels.rgb import array_rgb, is_upright, keeps_shape, upright_rgb

LARGEST_KEPT = 1 << 25  # pixels of a JPEG that is left to a GPU
SPARE = 2  # a JPEG decoded smaller keeps at least SPARE times the edges of the resized image, as input of the filter


def load(
    source: str | bytes, spec: PixelSpec, *, max_pixels: int, facts: Collection[str] = (), fast: bool = False
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """`read`, then `resize`: the pixels uint8 [height, width, 3] of the image, and its `facts`.

    `source` is a file's path, or the bytes of a file. `fast` lets libjpeg decode a large JPEG at a half, a quarter or an
    eighth of its size, which is faster and changes the pixels slightly.

    Raises:
        ImageError: any error of decoding or memory.
    """
    with image_errors():
        image, found = read(source, max_pixels=max_pixels, facts=facts, shrink_for=spec if fast else None)
        return resize(image, spec), found


def load_whole(
    source: str | bytes, *, max_pixels: int, facts: Collection[str] = (), max_edge: int | None = None
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """`read`, then `within`: the upright image as uint8 [height, width, 3], and its `facts`.

    Raises:
        ImageError: as `load`.
    """
    with image_errors():
        image, found = read(source, max_pixels=max_pixels, facts=facts)
        return np.array(within(image, max_edge)), found


def within(image: Image.Image, max_edge: int | None) -> Image.Image:
    """The image with its longest edge at most `max_edge` pixels (None: no limit) and its aspect ratio kept."""
    scale = 1.0 if max_edge is None else max_edge / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def load_or_keep(
    source: str | bytes, spec: PixelSpec, *, max_pixels: int, facts: Collection[str] = ()
) -> tuple[npt.NDArray[np.uint8], dict[str, str | int]]:
    """`load`, except for plain JPEGs: these are returned undecoded, as the bytes of the file, uint8 [n], for a GPU.

    Raises:
        ImageError: as `load`. Of a plain JPEG only the header is checked.
    """
    with image_errors():
        with open_image(source) as stream, pillow_limits(max_pixels):
            image = identify(stream)
            data = stream.getvalue() if isinstance(stream, io.BytesIO) else b""
            if is_plain_jpeg(image, data):
                refuse_large(image.size, max_pixels)
                height, width = spec.resized(image.height, image.width)
                refuse_shape(image, (width, height), cropped=spec.crop is not None)
                found = _file_facts(stream, image, facts) | {"width": image.width, "height": image.height}
                return np.frombuffer(data, np.uint8).copy(), {name: found[name] for name in facts}
        return load(data or source, spec, max_pixels=max_pixels, facts=facts)


def is_plain_jpeg(image: Image.Image, data: bytes) -> bool:
    """Whether any JPEG decoder gives the right image without further settings: upright YCbCr, complete, not too large.

    Progressive files are excluded: they may have thousands of scans, and only a process can be ended while it decodes.
    """
    return (
        type(image) is JpegImageFile
        and image.mode == "RGB"
        and [component[0] for component in image.layer] == [1, 2, 3]  # other numbers may mean other colours
        and image.info.get("adobe_transform", 1) == 1
        and not image.info.get("progressive")
        and image.width * image.height <= LARGEST_KEPT
        and is_upright(image)
        and data.endswith(b"\xff\xd9")
    )


def read(
    source: str | bytes, *, max_pixels: int, facts: Collection[str] = (), shrink_for: PixelSpec | None = None
) -> tuple[Image.Image, dict[str, str | int]]:
    """Open an image by its path or its file's bytes: upright RGB (the first of several frames), and the `facts` of `FACTS`.

    Width and height are those of the upright image; format and mode are Pillow's names for the content of the file. An
    image of more than `max_pixels` is refused before it is decoded. With `shrink_for` a JPEG may be decoded smaller, but
    never smaller than SPARE times the size that this processor resizes it to.

    Raises:
        ImageError: it is not a regular file or not an image, is truncated or too large, or cannot be decoded.
    """
    with image_errors(), open_image(source) as stream, pillow_limits(max_pixels):
        image = identify(stream)
        refuse_large(image.size, max_pixels)
        found = _file_facts(stream, image, facts)
        whole = None if shrink_for is None else shrink(image, shrink_for)
        rgb = upright_rgb(image)
        refuse_large(rgb.size, max_pixels)  # in some containers the header gives another size
        width, height = whole or rgb.size
        found |= {"width": width, "height": height}
        return rgb, {name: found[name] for name in facts}


def _file_facts(stream: Stream, image: Image.Image, facts: Collection[str]) -> dict[str, str | int]:
    """The facts known before decoding; the position of `stream` is unchanged."""
    found: dict[str, str | int] = {"format": image.format or "", "mode": image.mode}
    before = stream.tell()
    if "sha256" in facts:
        stream.seek(0)
        found["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    found["bytes"] = stream.seek(0, os.SEEK_END)
    stream.seek(before)
    return found


def shrink(image: Image.Image, spec: PixelSpec) -> tuple[int, int] | None:
    """Have libjpeg decode at a fraction of the size; the upright image's full (width, height), or None if unchanged.

    The scaling is part of the discrete cosine transform (Pillow's `draft`), where most of the decoding time is spent.
    """
    if not isinstance(image, JpegImageFile):
        return None
    same_shape = keeps_shape(image)
    width, height = image.size if same_shape else image.size[::-1]
    rows, columns = spec.resized(height, width)
    wanted = (SPARE * columns, SPARE * rows)
    before = image.size
    image.draft(None, wanted if same_shape else wanted[::-1])
    return None if image.size == before else (width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB; the image itself if it is already.

    Raises:
        ImageError: it is empty, or cannot be decoded or converted.
    """
    if 0 in image.size:
        raise ImageError("unreadable", f"an image of {image.width}x{image.height} pixels is empty")
    with image_errors(), pillow_limits(None):
        return upright_rgb(image)


def from_array(array: npt.NDArray[np.generic]) -> Image.Image:
    """RGB from [height, width] or [height, width, 1 | 3 | 4]: uint8, uint16, bool, or floats from 0 to 1.

    Raises:
        ImageError: another shape or dtype, an empty array, or floats outside 0 to 1.
    """
    with image_errors():
        return array_rgb(array)
