"""WebP, GIF and TIFF files reduced to their image data and orientation, for files with damaged metadata."""

from __future__ import annotations

import struct
from collections.abc import Iterator

WEBP_IMAGE = {b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"}
WEBP_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # in VP8X: colour profile, EXIF, XMP
EXIF_FLAG = 0x08
GIF_EXTENSION, GIF_IMAGE, GIF_TRAILER, GIF_GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9
TIFF_BYTE_ORDERS = {b"II*\0": "<", b"MM\0*": ">"}
TIFF_ENTRY = 12  # bytes
TIFF_IMAGE_TAGS = (
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(330, 332, 334, 336, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
)


def reduced_webps(data: bytes) -> Iterator[bytes]:
    """The WebP with its image data and EXIF, and with its image data only; none where an image chunk is cut off."""
    chunks = list(_webp_chunks(data))
    if any(body is None for kind, body in chunks if kind in WEBP_IMAGE):
        return
    for kept in (WEBP_IMAGE | {b"EXIF"}, WEBP_IMAGE):
        whole = [(kind, body) for kind, body in chunks if kind in kept and body is not None]
        if whole:
            yield _written_webp(whole)


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes | None]]:
    """Kind and content of each chunk; None for the content of one that the file ends in."""
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + size]
        yield data[at : at + 4], body if len(body) == size else None
        at += 8 + size + size % 2


def _written_webp(chunks: list[tuple[bytes, bytes]]) -> bytes:
    has_exif = any(kind == b"EXIF" for kind, _ in chunks)
    pieces = [b"WEBP"]
    for kind, body in chunks:
        if kind == b"VP8X" and body:
            body = bytes([body[0] & ~WEBP_METADATA_FLAGS | (EXIF_FLAG if has_exif else 0)]) + body[1:]
        pieces += [kind, struct.pack("<I", len(body)), body, bytes(len(body) % 2)]
    content = b"".join(pieces)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def reduced_gifs(data: bytes) -> Iterator[bytes]:
    """The first frame of a GIF, with its transparency."""
    at = 13 + _colour_table(data[10:11])
    header, control = data[:at], b""
    while at < len(data):
        start, kind = at, data[at]
        if kind == GIF_EXTENSION:
            at = _after_blocks(data, at + 2)
            if data[start + 1 : start + 3] == bytes([GIF_GRAPHIC_CONTROL, 4]):
                control = data[start:at]
        elif kind == GIF_IMAGE:
            end = _after_blocks(data, at + 11 + _colour_table(data[at + 9 : at + 10]))
            yield header + control + data[start:end] + bytes([GIF_TRAILER])
            return
        else:
            at += 1


def _colour_table(flags: bytes) -> int:
    """The length of the colour table that the flags announce."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    """The position after the data blocks that start at `at`: each begins with its length, and the last is empty."""
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


def reduced_tiffs(data: bytes) -> Iterator[bytes]:
    """The TIFF with only the tags of the image data in its first directory."""
    order = TIFF_BYTE_ORDERS[data[:4]]
    start = struct.unpack(f"{order}I", data[4:8])[0] if len(data) >= 8 else len(data)
    if start + 2 > len(data):
        return
    count = struct.unpack(f"{order}H", data[start : start + 2])[0]
    entries = (data[at : at + TIFF_ENTRY] for at in range(start + 2, start + 2 + count * TIFF_ENTRY, TIFF_ENTRY))
    kept = [entry for entry in entries if len(entry) == TIFF_ENTRY and _tag(entry, order) in TIFF_IMAGE_TAGS]
    directory = b"".join([struct.pack(f"{order}H", len(kept)), *kept, bytes(4)])  # no other directory follows
    yield data[:start] + directory + data[start + len(directory) :]


def _tag(entry: bytes, order: str) -> int:
    return int(struct.unpack(f"{order}H", entry[:2])[0])
