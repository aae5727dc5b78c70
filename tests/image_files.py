"""Generated pictures as image files, and parts of such files."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {}),
    "webp-lossless": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "avif": ("AVIF", {"speed": 10}),
    "jpeg2000": ("JPEG2000", {}),
    "ico": ("ICO", {"sizes": [(48, 48)]}),
    "icns": ("ICNS", {}),
    "ppm": ("PPM", {}),
    "qoi": ("QOI", {}),
    "tga": ("TGA", {"compression": "tga_rle"}),
    "sgi": ("SGI", {}),
    "pcx": ("PCX", {}),
    "dds": ("DDS", {}),
}


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth colours, so that lossy formats change little; no symmetry, so that every orientation differs."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    writer, defaults = WRITERS.get(name, (name.upper(), {}))
    image.save(file, writer, **defaults, **options)
    return file.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def noise(width: int = 64, height: int = 48) -> Image.Image:
    """Random colours: every part of the compressed data changes some pixels."""
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body
