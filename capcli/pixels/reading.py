"""Files and their bytes to upright RGB images and to pixels, with facts about the file."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from capcli.errors import ImageError
from capcli.pixels.container_data import TIFF_BYTE_ORDERS, reduced_gifs, reduced_tiffs, reduced_webps
from capcli.pixels.guards import image_errors, pillow_limits, refuse_large
from capcli.pixels.jpeg_data import SOI, reduced_jpegs
from capcli.pixels.opening import MemoryFile, Stream, identify, open_image
from capcli.pixels.png_data import SIGNATURE, has_all_rows, reduced_pngs
from capcli.pixels.processor import PixelSpec
from capcli.pixels.resizing import refuse_shape, resize
from capcli.pixels.rgb import array_rgb, is_upright, keeps_shape, upright_rgb

LARGEST_KEPT = 1 << 25  # pixels of a JPEG that is left to a GPU
LARGEST_REDUCED = 1 << 29  # bytes of a file that is read whole to remove its metadata
SPARE = 2  # a JPEG decoded smaller keeps at least SPARE times the edges of the resized image, as input of the filter

REDUCED: dict[bytes, Callable[[bytes], Iterator[bytes]]] = {
    SIGNATURE: reduced_pngs,
    SOI: reduced_jpegs,
    b"RIFF": reduced_webps,
    b"GIF8": reduced_gifs,
    **dict.fromkeys(TIFF_BYTE_ORDERS, reduced_tiffs),
}
Decoded: TypeAlias = tuple[Image.Image, dict[str, str | int]]


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
        with open_image(source) as stream:
            data = stream.getvalue() if isinstance(stream, MemoryFile) else b""
            image = _plain_jpeg(data, max_pixels)
            if image is not None:
                height, width = spec.resized(image.height, image.width)
                refuse_shape(image, (width, height), cropped=spec.crop is not None)
                found = _file_facts(stream, facts) | {"format": image.format or "", "mode": image.mode}
                found |= {"width": image.width, "height": image.height}
                return np.frombuffer(data, np.uint8).copy(), {name: found[name] for name in facts}
        return load(data or source, spec, max_pixels=max_pixels, facts=facts)


def _plain_jpeg(data: bytes, max_pixels: int) -> Image.Image | None:
    """The image, not decoded, where `is_plain_jpeg`; None for other and for damaged files, and for one too large."""
    with contextlib.suppress(ImageError), image_errors(), pillow_limits(max_pixels):
        image = identify(MemoryFile(data))
        refuse_large(image.size, max_pixels)
        if is_plain_jpeg(image, data):
            return image
    return None


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
    with image_errors(), open_image(source) as stream:
        decode = partial(_decode, max_pixels=max_pixels, shrink_for=shrink_for)
        try:
            rgb, found = decode(stream)
        except ImageError as error:
            if error.kind != "unreadable":
                raise
            rgb, found = _decode_reduced(stream, decode, error, max_pixels)
        found |= _file_facts(stream, facts)
        return rgb, {name: found[name] for name in facts}


def _decode(stream: Stream, *, max_pixels: int, shrink_for: PixelSpec | None) -> Decoded:
    """The upright RGB image, and format, mode, width and height. Raises ImageError."""
    with image_errors(), pillow_limits(max_pixels):
        image = identify(stream)
        refuse_large(image.size, max_pixels)
        found: dict[str, str | int] = {"format": image.format or "", "mode": image.mode}
        whole = None if shrink_for is None else shrink(image, shrink_for)
        rgb = upright_rgb(image)
        refuse_large(rgb.size, max_pixels)  # in some containers the header gives another size
        if image.format == "PNG" and _ends_black(image) and not has_all_rows(_content(stream)):
            raise ImageError("unreadable", "it cannot be decoded: its last rows are missing")
        width, height = whole or rgb.size
        return rgb, found | {"width": width, "height": height}


def _decode_reduced(stream: Stream, decode: Callable[[Stream], Decoded], error: ImageError, max_pixels: int) -> Decoded:
    """Decode the image data without the metadata around it; raises `error`, that of the whole file, where that fails."""
    with pillow_limits(max_pixels):
        for data in _reduced_files(stream):
            with contextlib.suppress(ImageError):
                return decode(MemoryFile(data))
    raise error


def _reduced_files(stream: Stream) -> Iterator[bytes]:
    """Versions of the file with less and less metadata; none of a very large file, and of formats without a function."""
    content = _content(stream)
    for beginning, reduced in REDUCED.items():
        if content.startswith(beginning):
            return reduced(content)
    return iter(())


def _content(stream: Stream) -> bytes:
    """All bytes of the file; none of a very large one."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    if isinstance(stream, MemoryFile):
        return stream.getvalue()
    return stream.read() if size <= LARGEST_REDUCED else b""


def _ends_black(image: Image.Image) -> bool:
    """Whether one of the last two rows is black or transparent: in an interlaced image the last may be complete."""
    rows = (image.crop((0, row, image.width, row + 1)) for row in range(max(0, image.height - 2), image.height))
    return any(row.getbbox(alpha_only=False) is None for row in rows)


def _file_facts(stream: Stream, facts: Collection[str]) -> dict[str, str | int]:
    """The requested facts of the file itself: `bytes` and `sha256`."""
    found: dict[str, str | int] = {"bytes": stream.seek(0, os.SEEK_END)}
    if "sha256" in facts:
        stream.seek(0)
        found["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
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
