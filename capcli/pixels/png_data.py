"""PNG files reduced to their image data, so that large or damaged metadata does not make whole pixels unreadable.

Pillow refuses a PNG for any chunk that it cannot read. libpng, and with it every browser, ignores ancillary chunks.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice

SIGNATURE = b"\x89PNG\r\n\x1a\n"
IMAGE_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT"}
TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}
ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
LARGEST_ORIENTATION = 1 << 20  # bytes of a chunk from which the orientation is read
TRANSPARENT_BYTES = {0: {2}, 2: {6}, 3: set(range(1, 257))}  # lengths of tRNS, by the colour type
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # per pixel, by the colour type
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
HEADER_LENGTH = 13
RESTARTS = 100  # positions that are tried to find the next chunk after damage
_KNOWN = re.compile(rb"IHDR|PLTE|tRNS|IDAT|IEND|eXIf|[tzi]TXt")
_INFLATED = 1 << 16  # bytes that are inflated at a time, to at most a thousand times as many


def reduced_pngs(data: bytes) -> Iterator[bytes]:
    """The PNG with its image data and orientation, and with its image data only; none where the image data is damaged.

    The last IDAT chunk may end early: whether the pixels are complete is for the decoder to find out.
    """
    parts: list[tuple[bytes, bytes]] = []
    for kind, body, intact in _chunks(data):
        if kind in (b"IHDR", b"PLTE", b"IDAT") and not intact:
            return
        if kind in IMAGE_CHUNKS or _has_orientation(kind, body):
            parts.append((kind, body))
    if not parts or parts[0][0] != b"IHDR" or len(parts[0][1]) != HEADER_LENGTH:
        return
    colour_type = parts[0][1][9]
    transparency = TRANSPARENT_BYTES.get(colour_type, set())
    parts = [(kind, body) for kind, body in parts if kind != b"tRNS" or len(body) in transparency]
    yield _written(parts)
    yield _written([(kind, body) for kind, body in parts if kind in IMAGE_CHUNKS])


def _has_orientation(kind: bytes, body: bytes) -> bool:
    if len(body) > LARGEST_ORIENTATION:
        return False
    return kind == b"eXIf" or (kind in TEXT_CHUNKS and body.startswith(ORIENTATION_TEXTS))


def _written(parts: list[tuple[bytes, bytes]]) -> bytes:
    pieces = [SIGNATURE]
    for kind, body in [*parts, (b"IEND", b"")]:
        pieces += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))]
    return b"".join(pieces)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Kind, content and whether the checksum is right, of each chunk up to IEND; what is no chunk is skipped."""
    at: int | None = len(SIGNATURE)
    while at is not None and at + 8 <= len(data):
        kind, end = data[at + 4 : at + 8], _end(data, at)
        if kind == b"IDAT" and end > len(data):
            yield kind, data[at + 8 : end - 4], True  # the file ends in it or in its checksum
            return
        intact = _is_intact(data, at)
        if not intact and not (_is_header(data, at) and (end == len(data) or _is_header(data, end))):
            at = _next_intact(data, at + 1)
            continue
        if kind == b"IEND":
            return
        yield kind, data[at + 8 : end - 4], intact
        at = end


def _end(data: bytes, at: int) -> int:
    return at + 12 + int.from_bytes(data[at : at + 4], "big")


def _is_header(data: bytes, at: int) -> bool:
    """Whether a chunk can start here."""
    kind = data[at + 4 : at + 8]
    return len(kind) == 4 and kind.isalpha() and (_end(data, at) <= len(data) or kind == b"IDAT")


def _is_intact(data: bytes, at: int) -> bool:
    end = _end(data, at)
    if end > len(data):
        return False
    return zlib.crc32(memoryview(data)[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")


def _next_intact(data: bytes, start: int) -> int | None:
    """The position of the next chunk with a right checksum; None where there is none, or too many candidates."""
    found = (match.start() - 4 for match in islice(_KNOWN.finditer(data, start + 4), RESTARTS))
    return next((at for at in found if _is_intact(data, at)), None)


def has_all_rows(data: bytes) -> bool:
    """Whether the PNG's compressed data is as long as its size demands: Pillow accepts an early end, and leaves it black."""
    header, *bodies = [body for kind, body, _ in _chunks(data) if kind in (b"IHDR", b"IDAT")] or [b""]
    if len(header) != HEADER_LENGTH:  # a file that was too large to be read, or an unusual order of chunks
        return True
    missing = _raw_length(header)
    inflate = zlib.decompressobj()
    for body in bodies:
        for start in range(0, len(body), _INFLATED):
            missing -= len(inflate.decompress(body[start : start + _INFLATED]))
            if missing <= 0:
                return True
    return missing <= len(inflate.flush())


def _raw_length(header: bytes) -> int:
    """The bytes of all rows, with one byte for the filter of each."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * SAMPLES[colour_type]
    total = 0
    for left, top, right, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        total += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return total
