"""JPEG files reduced to their image data, and completed by the end marker where only that is missing.

Pillow refuses a JPEG for metadata that it cannot parse, for bytes between segments, and for a missing end marker.
libjpeg ignores the first two, and decodes the third, whose pixels may nevertheless all be in the file.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from itertools import product
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
SOS, APP0, APP1, APP14, COM = 0xDA, 0xE0, 0xE1, 0xEE, 0xFE
DHT, DQT = 0xC4, 0xDB
TABLES = {DHT, DQT, 0xCC, 0xDD}  # the last two: DAC, DRI
FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF
METADATA = {*range(0xE0, 0xF0), COM}
ORIENTATION = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")
COEFFICIENTS = 64
Trust: TypeAlias = Literal["every length", "if a segment follows", "no length"]  # of segments of metadata
FINAL_ZEROS = 3  # bytes at the end of a file that may be image data; more were reserved for it and never written
_MARKER = re.compile(rb"\xff+([\x02-\xcf\xda-\xfe])", re.DOTALL)
_IN_SCAN = re.compile(rb"\xff+([\x02-\xcf\xd9-\xfe])", re.DOTALL)  # a marker that ends the data of a scan
_NOISE = (
    hashlib.shake_128().digest(1024).replace(b"\xff", b"\x55").replace(b"\0", b"\x55")
)  # no marker, nor its opposite
_OPPOSITE = bytes(255 - byte for byte in _NOISE)
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")


def reduced_jpegs(data: bytes) -> Iterator[bytes]:
    """The JPEG with its image data and orientation, and with its image data only, with an end marker.

    Segments whose length is wrong are skipped in further versions. There is none where the image data is incomplete.
    """
    tried = set()
    for trust, oriented in product(get_args(Trust), (True, False)):
        reduced = _reduced(data, trust, oriented=oriented)
        if reduced is None or reduced in tried:
            continue
        tried.add(reduced)
        complete = reduced if _has_end(reduced) else _with_end(reduced)
        if complete is not None:
            yield complete


def _reduced(data: bytes, trust: Trust, *, oriented: bool) -> bytes | None:
    """The file without metadata and without bytes between segments; None where there is no image in it."""
    pieces = [SOI]
    framed = False
    for marker, start, end in _segments(data, trust):
        framed = framed or marker in FRAMES
        if marker == SOS:
            return b"".join([*pieces, data[start:]]) if framed else None
        if marker in FRAMES | TABLES or _is_needed(marker, data[start + 4 : end], oriented=oriented):
            pieces.append(data[start:end])
    return None


def _is_needed(marker: int, body: bytes, *, oriented: bool) -> bool:
    """Whether a segment of metadata states the colour space or the orientation."""
    if marker == APP0:
        return body.startswith(b"JFIF\0") and len(body) >= 14
    if marker == APP14:
        return body.startswith(b"Adobe") and len(body) >= 12
    return oriented and marker == APP1 and body.startswith(ORIENTATION)


def _segments(data: bytes, trust: Trust = "every length") -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the first start of scan.

    Of a segment of metadata whose length is not trusted, only the image within it, a thumbnail, is skipped.
    """
    at = len(SOI)
    while (found := _MARKER.search(data, at)) is not None:
        marker, start = found[1][0], found.end() - 2
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        known = marker in FRAMES | TABLES | METADATA | {SOS}
        followed = data[end : end + 1] == b"\xff"
        trusted = marker not in METADATA or trust == "every length" or (followed and trust == "if a segment follows")
        if not known or end < start + 4 or not _is_plausible(marker, data[start + 4 : end]):
            at = start + 2
        elif trusted:
            yield marker, start, end
            at = end
        else:
            at = _after_thumbnail(data, start + 4)


def _is_plausible(marker: int, body: bytes) -> bool:
    """Whether the length of a segment fits its content; True for metadata and unusual segments."""
    if marker in FRAMES:
        return len(body) > 6 and len(body) == 6 + 3 * body[5]
    if marker == SOS:
        return len(body) > 4 and len(body) == 4 + 2 * body[0]
    if marker not in (DHT, DQT):
        return True
    at = 0
    while at < len(body):
        values = sum(body[at + 1 : at + 17]) + 16 if marker == DHT else 64 << (body[at] >> 4)
        at += 1 + values
    return at == len(body)


def _after_thumbnail(data: bytes, at: int) -> int:
    """The position after the image that starts before the next marker, or else `at`."""
    found = _MARKER.search(data, at)
    inner = data.find(SOI + b"\xff", at)
    if found is None or inner < 0 or inner > found.start():
        return at
    end = data.find(EOI, inner)
    return at if end < 0 else end + 2


def _has_end(data: bytes) -> bool:
    return any(marker == EOI[1] for marker, _ in _scans(data))


def _scans(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment from the first start of scan on, up to the end marker."""
    first = next((start for marker, start, _ in _segments(data) if marker == SOS), len(data))
    at = first
    while (found := _IN_SCAN.search(data, at)) is not None:
        start = found.end()
        end = start if found[1] == EOI[1:] else start + int.from_bytes(data[start : start + 2], "big")
        yield found[1][0], data[start + 2 : end]
        if found[1] == EOI[1:]:
            return
        at = end


def _with_end(data: bytes) -> bytes | None:
    """The file with an end marker; None where image data is missing before it.

    A decoder reads no further than the last pixel. So the file is complete where its pixels are the same, whatever
    follows: here two strings of opposite bits, with the markers at which a decoder restarts.
    """
    written = data.rstrip(b"\0")
    data = data[: len(written) + FINAL_ZEROS]
    data += b"\0" if data.endswith(b"\xff") else b""  # half a marker, or a byte 255, whose zero was cut off
    if not _has_every_coefficient(data):
        return None
    restarts = [b"", *_next_restarts(data)]
    first, second = (_digest(data + b"".join(mark + noise for mark in restarts) + EOI) for noise in (_NOISE, _OPPOSITE))
    return data + EOI if first is not None and first == second else None


def _next_restarts(data: bytes) -> Iterator[bytes]:
    """The restart markers that a decoder expects after the last one of the last scan: they count from 0 to 7."""
    passed = _RESTART.findall(data, data.rfind(bytes([0xFF, SOS])))
    first = passed[-1][0] + 1 if passed else 0xD0
    return (bytes([0xFF, 0xD0 + (first + number) % 8]) for number in range(8))


def _digest(data: bytes) -> bytes | None:
    """A hash of the pixels; None where the file cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return hashlib.blake2b(np.asarray(image).tobytes()).digest()
    except Exception:  # a codec may raise anything
        return None


def _has_every_coefficient(data: bytes) -> bool:
    """Whether the scans contain all bits of all coefficients of all components: progressive JPEGs have several scans."""
    frame = next(data[start + 4 : end] for marker, start, end in _segments(data) if marker in FRAMES)
    missing = {(frame[at], number) for at in range(6, len(frame) - 2, 3) for number in range(COEFFICIENTS)}
    for marker, body in _scans(data):
        if marker == SOS and len(body) >= 6:
            first, last, bits = body[-3:]
            components = body[1 : 1 + 2 * body[0] : 2]
            if bits & 15 == 0:
                missing -= set(product(components, range(first, last + 1)))
    return not missing
