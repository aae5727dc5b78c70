"""Image files whose metadata is large, damaged or cut off: their pixels are those of the clean file.

A file whose image data is incomplete is a failure.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import encoded, jpeg_segment, noise, picture, png_chunk
from PIL import Image, ImageFile
from running import call, paint

from capcli import pixels
from capcli.errors import ImageError

MAX = 10_000_000
PNG, JPEG, WEBP, GIF = (encoded(noise(), name) for name in ("png", "jpeg", "webp-lossless", "gif"))
AFTER_IHDR, BEFORE_IEND, FIRST_GIF_BLOCK = 33, len(PNG) - 12, 13 + 3 * 256
WORKFLOW = b'{"id": 1, "type": "LoadImage"},' * 40_000  # 1.2 MB
JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_blocks": 2},
    "restarts in each row": {"restart_marker_rows": 1},
    "full chroma": {"subsampling": 0},
}


def read(data: bytes) -> np.ndarray:
    return np.asarray(pixels.read(data, max_pixels=MAX)[0])


def assert_same(data: bytes, clean: bytes) -> None:
    assert np.array_equal(read(data), read(clean))


def failure(data: bytes) -> ImageError:
    with pytest.raises(ImageError) as caught:
        read(data)
    return caught.value


def same_or_failure(data: bytes, clean: np.ndarray) -> bool:
    """Whether the image is read; it must then be the clean one."""
    try:
        found = read(data)
    except ImageError:
        return False
    assert np.array_equal(found, clean)
    return True


def wrong_checksum(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


def with_orientation(name: str, value: int = 6) -> bytes:
    exif = Image.Exif()
    exif[274] = value
    return encoded(noise(), name, exif=exif.tobytes())


# PNG

PNG_CHUNKS = {
    "compressed text": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
    "international text": png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(WORKFLOW)),
    "much text": png_chunk(b"tEXt", b"a\0" + b"a" * 2_000_000) * 40,
    "large profile": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2_000_000))),
    "unknown compression": png_chunk(b"iCCP", b"profile\0\5abc"),
    "empty profile": png_chunk(b"iCCP", b""),
    "large EXIF": png_chunk(b"eXIf", b"MM\0*" + b"\xff" * 2_000_000),
    "damaged EXIF": png_chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff"),
    "short gamma": png_chunk(b"gAMA", b"\0\0"),
    "short chromaticity": png_chunk(b"cHRM", b"\0"),
    "empty intent": png_chunk(b"sRGB", b""),
    "short resolution": png_chunk(b"pHYs", b"\0"),
    "short colour space": png_chunk(b"cICP", b"\0"),
    "short time": png_chunk(b"tIME", b"\0"),
    "short transparency": png_chunk(b"tRNS", b"\0"),
    "animation of one frame": png_chunk(b"acTL", struct.pack(">II", 5, 0)) + png_chunk(b"fcTL", bytes(26)),
    "short animation": png_chunk(b"acTL", b"\0"),
    "frame out of order": png_chunk(b"fdAT", bytes(26)),
    "bytes that are no chunk": bytes(range(40)),
    "length beyond the end": struct.pack(">I", 2**30) + b"tEXt" + b"a\0b" + bytes(4),
    "length too small": struct.pack(">I", 2) + b"tEXt" + b"a\0bcdefghi" + bytes(4),
    "unknown chunk": wrong_checksum(png_chunk(b"abCd", b"abc")),
} | {
    f"checksum of {kind.decode()}": wrong_checksum(png_chunk(kind, body))
    for kind, body in {
        b"pHYs": struct.pack(">IIB", 2835, 2835, 1),
        b"iCCP": b"profile\0\0" + zlib.compress(bytes(600)),
        b"tEXt": b"Software\0editor",
        b"zTXt": b"Software\0\0" + zlib.compress(b"editor"),
        b"iTXt": b"Software\0\0\0\0\0editor",
        b"eXIf": b"MM\0*\0\0\0\x08\0\0",
        b"gAMA": struct.pack(">I", 45455),
        b"cHRM": bytes(32),
        b"sRGB": b"\0",
        b"cICP": b"\1\1\1\1",
        b"tIME": bytes(7),
        b"bKGD": bytes(6),
        b"acTL": struct.pack(">II", 1, 0),
    }.items()
}


@pytest.mark.parametrize("chunk", PNG_CHUNKS.values(), ids=PNG_CHUNKS)
def test_ancillary_chunks_of_a_png_cost_no_pixels(chunk: bytes) -> None:
    for at in (AFTER_IHDR, BEFORE_IEND):
        assert_same(PNG[:at] + chunk + PNG[at:], PNG)


def test_a_chunk_within_the_image_data_of_a_png() -> None:
    data = PNG[AFTER_IHDR + 8 : BEFORE_IEND - 4]
    parts = png_chunk(b"IDAT", data[:100]), png_chunk(b"tEXt", b"a\0b"), png_chunk(b"IDAT", data[100:])
    assert_same(PNG[:AFTER_IHDR] + b"".join(parts) + PNG[BEFORE_IEND:], PNG)


@pytest.mark.parametrize("metadata", [b"", PNG_CHUNKS["checksum of pHYs"]])
def test_orientation_and_transparency_outlive_damaged_metadata(metadata: bytes) -> None:
    turned = with_orientation("png")
    at = turned.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(turned[at : at + 4], "big")
    assert read(turned).shape == (64, 48, 3)
    assert_same(turned[:at] + metadata + wrong_checksum(turned[at:end]) + turned[end:], turned)
    clear = encoded(picture().convert("P"), "png", transparency=3)
    at = clear.index(b"tRNS") - 4
    end = at + 12 + int.from_bytes(clear[at : at + 4], "big")
    assert_same(clear[:at] + metadata + wrong_checksum(clear[at:end]) + clear[end:], clear)


@pytest.mark.parametrize("missing", [1, 5, 12, 14, 16])
def test_a_png_without_its_last_chunk(missing: int) -> None:
    assert_same(PNG[:-missing], PNG)
    damaged = PNG[:AFTER_IHDR] + PNG_CHUNKS["checksum of pHYs"] + PNG[AFTER_IHDR:]
    assert_same(damaged[:-missing], PNG)
    assert_same(PNG + bytes(range(256)), PNG)


@pytest.mark.parametrize("metadata", [b"", PNG_CHUNKS["checksum of pHYs"]])
@pytest.mark.parametrize("interlaced", [False, True])
def test_a_png_with_too_little_image_data_is_a_failure(metadata: bytes, interlaced: bool) -> None:
    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, int(interlaced))
    rows = np.random.default_rng(0).integers(1, 5, 16 * 49 + 15 * interlaced * 3, dtype=np.uint8)
    rows[::49] = 0
    whole = (b"\0" * (16 * 49)) if interlaced else rows.tobytes()
    beginning = PNG[:8] + png_chunk(b"IHDR", header) + metadata
    for data in (zlib.compress(whole)[:-8], zlib.compress(whole[: len(whole) // 2]), zlib.compress(b"")):
        assert failure(beginning + png_chunk(b"IDAT", data) + PNG[-12:]).kind == "unreadable"


def test_a_png_that_ends_in_black_rows_is_whole() -> None:
    for mode in ("RGB", "RGBA", "L", "1", "P", "I;16"):
        black = Image.new(mode, (20, 10))
        assert read(encoded(black, "png")).shape == (10, 20, 3)


def test_bombs_in_metadata_do_not_swell_the_process() -> None:
    bomb = zlib.compress(bytes(200_000_000))
    text = (
        png_chunk(b"zTXt", b"a\0\0" + bomb)
        + png_chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)
        + png_chunk(b"iCCP", b"a\0\0" + bomb)
    )
    orientation = png_chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb)
    data = PNG[:AFTER_IHDR] + text + orientation + PNG[AFTER_IHDR:]
    tracemalloc.start()
    assert_same(data, PNG)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


# JPEG

JPEG_SEGMENTS = {
    "bytes between segments": b"between",
    "reserved marker": b"\xff\x02",
    "second start": b"\xff\xd8",
    "early end": b"\xff\xd9",
    "length beyond the end": b"\xff\xe5\xff\xffabcd",
    "length too small": b"\xff\xe5\0\3abcdefgh",
    "length of the next three": b"\xff\xfe\0\x5fabc",
    "length of nothing": b"\xff\xe5\0\0",
    "large comment": jpeg_segment(0xFE, b"a" * 60_000),
    "damaged EXIF": jpeg_segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "damaged XMP": jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe<"),
    "empty profile": jpeg_segment(0xE2, b"ICC_PROFILE\0"),
    "one part of a profile": jpeg_segment(0xE2, b"ICC_PROFILE\0\1\5abc"),
    "damaged Photoshop block": jpeg_segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "index of images that are missing": jpeg_segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1\xb0\1\0\4\0\0\0\1\0\0\0\2"),
    "short JFIF": jpeg_segment(0xE0, b"JFIF"),
    "short Adobe": jpeg_segment(0xEE, b"Adobe"),
}


def segment_starts(data: bytes) -> Iterator[int]:
    """The positions of the segments of a JPEG, up to its first scan."""
    at = 2
    while data[at + 1] != 0xDA:
        yield at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    yield at


@pytest.mark.parametrize("segment", JPEG_SEGMENTS.values(), ids=JPEG_SEGMENTS)
def test_damaged_segments_of_a_jpeg_cost_no_pixels(segment: bytes) -> None:
    clean = read(JPEG)
    for at in segment_starts(JPEG):
        assert np.array_equal(read(JPEG[:at] + segment + JPEG[at:]), clean), at


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_without_its_end_is_whole_only_if_every_pixel_is_in_it(options: dict[str, Any], mode: str) -> None:
    data = encoded(noise(40, 40).convert(mode), "jpeg", **options)
    clean = read(data)
    for missing in (1, 2):
        assert np.array_equal(read(data[:-missing]), clean)
    assert np.array_equal(read(data[:-2] + bytes(100)), clean)
    assert np.array_equal(read(data[:-2] + b"more" + data[-2:]), clean)
    assert np.array_equal(read(data + b"more"), clean)
    image_data = data.index(b"\xff\xda")
    found = [same_or_failure(data[:end], clean) for end in range(image_data, len(data) - 2, 37)]
    assert not any(found[: len(found) // 2])
    assert not same_or_failure(data[: (image_data + len(data)) // 2] + bytes(500), clean)


def test_orientation_outlives_damaged_segments_and_thumbnails_are_no_image() -> None:
    turned = with_orientation("jpeg")
    assert read(turned).shape == (64, 48, 3)
    assert_same(turned[:2] + JPEG_SEGMENTS["short JFIF"] + turned[2:-2], turned)
    thumbnail = bytearray(jpeg_segment(0xE3, b"preview" + encoded(picture(8, 8), "jpeg")))
    thumbnail[2:4] = b"\xff\xff"
    assert_same(turned[:2] + bytes(thumbnail) + turned[2:], turned)


def test_a_jpeg_is_left_to_the_gpu_only_if_it_is_clean() -> None:
    spec = pixels.PixelSpec.from_config({"image_processor_type": "ViTImageProcessor"})
    exact = pixels.load(JPEG, spec, max_pixels=MAX)[0]
    for data in (JPEG[:-2], JPEG[:2] + JPEG_SEGMENTS["short JFIF"] + JPEG[2:]):
        assert np.array_equal(pixels.load_or_keep(data, spec, max_pixels=MAX)[0], exact)
    assert pixels.load_or_keep(JPEG, spec, max_pixels=MAX)[0].tobytes() == JPEG


# WebP, GIF, TIFF


def riff(chunks: bytes, size: int | None = None) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(chunks) if size is None else size) + b"WEBP" + chunks


def test_damaged_metadata_of_a_webp() -> None:
    chunks = WEBP[12:]
    cut_off = b"EXIF" + struct.pack("<I", 100) + b"abc"
    for size in (0, 20, len(chunks) - 6, 2**30):
        assert_same(riff(chunks, size), WEBP)
    assert_same(riff(chunks + cut_off, len(chunks) + 112), WEBP)
    turned = with_orientation("webp-lossless")
    assert read(turned).shape == (64, 48, 3)
    assert_same(turned[:4] + bytes(4) + turned[8:], turned)
    assert np.array_equal(read(turned[: turned.index(b"EXIF") + 10]), read(WEBP))
    assert failure(WEBP[: len(WEBP) // 2]).kind == "unreadable"


@pytest.mark.parametrize(
    "block",
    [b"\x21\xf9\x01a\0", b"\x21\xf9\0", b"\x21\xff\0", b"\x21\xff\x0bNETSCAPE2.0\0", b"\x3b", b"\x21\x99\x02ab\0"],
)
def test_damaged_extensions_of_a_gif(block: bytes) -> None:
    assert_same(GIF[:FIRST_GIF_BLOCK] + block + GIF[FIRST_GIF_BLOCK:], GIF)
    assert_same(GIF[:-2], GIF)
    half = GIF[: len(GIF) // 2]
    assert failure(half[:FIRST_GIF_BLOCK] + block + half[FIRST_GIF_BLOCK:]).kind == "unreadable"


@pytest.mark.parametrize("change", ["offset", "type"])
@pytest.mark.parametrize("name", ["tiff", "tiff-lzw"])
def test_a_damaged_tag_of_a_tiff(name: str, change: str) -> None:
    clean = encoded(noise(), name, description="a description")
    data = bytearray(clean)
    directory = int.from_bytes(data[4:8], "little")
    tags = range(directory + 2, directory + 2 + 12 * data[directory], 12)
    at = next(at for at in tags if data[at : at + 2] == (270).to_bytes(2, "little"))
    data[at + 8 : at + 12] = b"\xff\xff\xff\x7f"
    if change == "type":
        data[at + 2] = 5
    assert_same(bytes(data), clean)
    assert failure(bytes(data[: len(data) // 2])).kind == "unreadable"


# Pillow's plugins


class ClosingImage(ImageFile.ImageFile):
    """As some plugins of Pillow do, it reads the file and closes it."""

    format = "CLOSING"

    def _open(self) -> None:
        assert self.fp is not None
        self.inner = Image.open(io.BytesIO(self.fp.read()[8:]))
        self.fp.close()
        self._size, self._mode = self.inner.size, self.inner.mode

    def load(self) -> Any:
        self._im = self.inner.convert(self.mode).im
        return super().load()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_plugin_may_close_its_file(in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not in_memory:
        monkeypatch.setattr(pixels.opening, "IN_MEMORY", 10)
    monkeypatch.setattr(Image, "ID", [*Image.ID, "CLOSING"])
    monkeypatch.setitem(Image.OPEN, "CLOSING", (ClosingImage, lambda head: head.startswith(b"CLOSING!")))
    (tmp_path / "image").write_bytes(b"CLOSING!" + PNG)
    found, facts = pixels.read(str(tmp_path / "image"), max_pixels=MAX, facts=pixels.FACTS)
    assert np.array_equal(np.asarray(found), read(PNG))
    assert (facts["format"], facts["bytes"]) == ("CLOSING", len(PNG) + 8)


# Random damage

ANCILLARY = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"tIME", b"eXIf"]
ANCILLARY += [b"acTL", b"fcTL", b"fdAT", b"hIST", b"sPLT", b"cICP", b"prVt"]
PREFIXES = [b"", b"a\0", b"a\0\0", b"a\0\1\0\0\0", b"XML:com.adobe.xmp\0\0\0\0\0", b"Raw profile type exif\0\n\n\n"]
SEGMENTS = [(0xE0, b"JFIF\0"), (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"), (0xE2, b"ICC_PROFILE\0")]
SEGMENTS += [(0xE2, b"MPF\0"), (0xED, b"Photoshop 3.0\x008BIM"), (0xEB, b"JP"), (0xFE, b"")]


def overwritten(part: bytes, draw: st.DrawFn) -> bytes:
    """The part with some of its bytes changed, its length and checksum included, but not its kind."""
    changed = bytearray(part)
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(part) - 1), st.integers(0, 255)), max_size=3)):
        changed[at] = value
    return bytes(changed)


@st.composite
def damaged_chunks(draw: st.DrawFn) -> bytes:
    body = draw(st.sampled_from(PREFIXES)) + draw(st.binary(max_size=40))
    kind = draw(st.sampled_from(ANCILLARY))
    chunk = overwritten(png_chunk(kind, body), draw)
    return chunk[:4] + kind + chunk[8:]


@st.composite
def damaged_segments(draw: st.DrawFn) -> bytes:
    marker, prefix = draw(st.sampled_from(SEGMENTS))
    segment = overwritten(jpeg_segment(marker, prefix + draw(st.binary(max_size=40))), draw)
    between = draw(st.binary(max_size=5)).replace(b"\xff", b"")
    return bytes([0xFF, marker]) + segment[2:] + between


@settings(max_examples=300, deadline=None)
@given(first=st.lists(damaged_chunks(), max_size=4), last=st.lists(damaged_chunks(), max_size=4))
def test_random_ancillary_chunks_change_no_pixel(first: list[bytes], last: list[bytes]) -> None:
    data = PNG[:AFTER_IHDR] + b"".join(first) + PNG[AFTER_IHDR:BEFORE_IEND] + b"".join(last) + PNG[BEFORE_IEND:]
    assert_same(data, PNG)


@settings(max_examples=300, deadline=None)
@given(segments=st.lists(damaged_segments(), max_size=3), place=st.integers(0), missing=st.integers(0, 2))
def test_random_metadata_segments_change_no_pixel(segments: list[bytes], place: int, missing: int) -> None:
    starts = list(segment_starts(JPEG))
    at = starts[place % len(starts)]
    data = JPEG[:at] + b"".join(segments) + JPEG[at : len(JPEG) - missing]
    assert_same(data, JPEG)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([PNG, JPEG, WEBP, GIF]), st.integers(1))
def test_a_file_that_is_cut_is_the_clean_image_or_a_failure(data: bytes, cut: int) -> None:
    same_or_failure(data[: len(data) - cut % len(data)], read(data))


# The command


def test_files_of_every_kind_are_one_row_or_one_failure(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", "a.png", "folder.jpg/b.png")
    failing = ["device.jpg", "empty.jpg", "gone.jpg", "loop.jpg", "pipe.jpg", "reserved.jpg", "socket.jpg"]
    (photos / "device.jpg").symlink_to("/dev/zero")
    (photos / "empty.jpg").touch()
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(photos / "pipe.jpg")
    with (photos / "reserved.jpg").open("wb") as file:
        file.truncate(5 << 30)
    with contextlib.chdir(photos), socket.socket(socket.AF_UNIX) as channel:
        channel.bind("socket.jpg")
        Image.new("L", (1, 65_000)).save("thin.jpg")
        Image.new("RGB", (60, 50), "red").convert("LAB").save("lab.tif")
        Image.fromarray(np.random.default_rng(0).random((40, 50), np.float32)).save("float.tif")
    out = tmp_path / "c.jsonl"
    assert call("caption", photos, "-m", captioner, "-o", out, "--workers", 1).code == 3
    rows = [json.loads(line)["file_name"] for line in out.read_text().splitlines()]
    failures = [json.loads(line)["file_name"] for line in (tmp_path / "c.failures.jsonl").read_text().splitlines()]
    assert rows == ["a.png", "float.tif", "folder.jpg/b.png", "lab.tif", "thin.jpg"]
    assert failures == failing


def test_images_with_damaged_metadata_have_the_captions_of_the_clean_ones(captioner: Path, tmp_path: Path) -> None:
    photos = paint(tmp_path / "photos", "clean.png", "clean.jpg")
    png, jpeg = (photos / "clean.png").read_bytes(), (photos / "clean.jpg").read_bytes()
    for number, chunk in enumerate(PNG_CHUNKS.values()):
        (photos / f"{number}.png").write_bytes(png[:AFTER_IHDR] + chunk + png[AFTER_IHDR:])
    for missing in (1, 2):
        (photos / f"{missing}.jpg").write_bytes(jpeg[:-missing])
    (photos / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    out = tmp_path / "c.jsonl"
    assert call("caption", photos, "-m", captioner, "-o", out, "--workers", 1).code == 3
    rows = {row.pop("file_name"): row for row in map(json.loads, out.read_text().splitlines())}
    failed = [json.loads(line)["file_name"] for line in (tmp_path / "c.failures.jsonl").read_text().splitlines()]
    assert failed == ["half.jpg"]
    assert len(rows) == 4 + len(PNG_CHUNKS)
    assert all(row == rows[f"clean.{name[-3:]}"] for name, row in rows.items())
