"""Contexts for calls into Pillow: they set and restore its global limits, and turn its exceptions into ImageError."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator

from PIL import Image, ImageFile

from capcli.errors import ImageError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler Python prints what plugins log
_lock = threading.RLock()


@contextlib.contextmanager
def pillow_limits(max_pixels: int | None) -> Iterator[None]:
    """Set Pillow's global settings, and restore them at the end.

    Pillow checks `max_pixels` where only it can (an icon's inner image, a frame larger than its GIF). Truncated files
    fail even where the embedding program allows them, and no warning is shown or raised.

    Raises:
        ImageError: too-large.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = max_pixels, False
        try:
            yield
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            pixels = re.search(r"\d+", str(error))
            raise too_large(pixels[0] if pixels else "its", max_pixels) from error
        finally:
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = before


def refuse_large(size: tuple[int, int], max_pixels: int) -> None:
    """Raises ImageError for a size (width, height) of more than `max_pixels`."""
    if size[0] * size[1] > max_pixels:
        raise too_large(f"{size[0]}x{size[1]}", max_pixels)


def too_large(pixels: str, max_pixels: int | None) -> ImageError:
    return ImageError("too-large", f"{pixels} pixels are more than the limit of {max_pixels}; --max-pixels allows more")


@contextlib.contextmanager
def image_errors() -> Iterator[None]:
    """Turn every exception of Pillow and its plugins into an ImageError with a message of one line."""
    try:
        yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("out-of-memory", "there was not enough memory to decode it") from error
    except Exception as error:
        raise ImageError("unreadable", f"it cannot be decoded: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The error's message without line breaks and addresses of objects, at most 200 characters."""
    line = " ".join(re.sub(r"<[^<>]*\bat 0x[0-9a-fA-F]+>", "the file", str(error)).split())
    printable = "".join(character if character.isprintable() else "?" for character in line)
    return printable[:200] or type(error).__name__
