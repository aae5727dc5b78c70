"""Files of every format and mode, and damaged or hostile files: an upright RGB image, or an ImageError of one line."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import WRITERS, encoded, picture, png_chunk
from PIL import Image, ImageCms, ImageFile

from capcli import pixels
from capcli.errors import ImageError
from capcli.pixels import PixelSpec, reading, resizing

MAX = 10_000_000
SPEC = PixelSpec.from_config({"image_processor_type": "ViTImageProcessor"})
MODES = ["1", "L", "LA", "P", "PA", "I;16", "I;16B", "I;16L", "I", "F", "RGB", "RGBA", "La", "RGBa", "RGBX", "CMYK"]
MODES += ["YCbCr", "LAB", "HSV"]
OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
UNREADABLE = {("icns", "P")} | ({("tiff", "YCbCr"), ("tga", "1")} if OLD_PILLOW else set())  # as Pillow writes them


def in_mode(mode: str) -> Image.Image:
    image = picture()
    if mode.startswith("I;16"):
        grey = np.asarray(image.convert("L")).astype(">u2" if mode.endswith("B") else "<u2") * 257
        return Image.frombytes(mode, image.size, grey.tobytes())
    steps = {"La": ["LA"], "RGBa": ["RGBA"], "PA": ["RGBA"], "HSV": ["RGB"]}.get(mode, [])
    for step in [*steps, mode]:
        image = image.convert(step)
    return image


def read(data: bytes, folder: Path, name: str = "image", max_pixels: int = MAX) -> np.ndarray:
    path = folder / name
    path.write_bytes(data)
    return np.asarray(pixels.read(str(path), max_pixels=max_pixels)[0])


def failure(data: bytes, folder: Path, max_pixels: int = MAX) -> ImageError:
    path = folder / "image"
    path.write_bytes(data)
    return failure_at(str(path), max_pixels)


def failure_at(path: str, max_pixels: int = MAX) -> ImageError:
    with pytest.raises(ImageError) as caught:
        pixels.load(path, SPEC, max_pixels=max_pixels, facts=pixels.FACTS)
    assert_readable(caught.value)
    return caught.value


def assert_readable(error: ImageError) -> None:
    message = str(error)
    assert message.isprintable()
    assert " object at 0x" not in message
    assert 0 < len(message) < 400
    assert error.kind
    assert " " not in error.kind


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff_with(image: Image.Image, changes: dict[int, int]) -> bytes:
    """A TIFF with other tag values than Pillow writes."""
    data = bytearray(encoded(image, "tiff"))
    directory = int.from_bytes(data[4:8], "little")
    for entry in range(int.from_bytes(data[directory : directory + 2], "little")):
        at = directory + 2 + 12 * entry
        tag = int.from_bytes(data[at : at + 2], "little")
        if tag in changes:
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, changes[tag])
    return bytes(data)


# Files by their path, and files in memory


def test_a_path_and_the_bytes_of_the_file_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "image"
    files = png_claiming(3000, 4000)[:60], encoded(picture(), "jpeg"), encoded(picture(), "tiff"), b"no image", b""
    for data in (*files, png_claiming(30_000, 30_000)):
        path.write_bytes(data)
        outcomes = []
        for source in (str(path), data):
            try:
                found, facts = pixels.load(source, SPEC, max_pixels=MAX, facts=pixels.FACTS)
                outcomes.append((found.tobytes(), facts))
            except ImageError as error:
                assert_readable(error)
                outcomes.append((error.kind, str(error)))
        assert outcomes[0] == outcomes[1]


# Modes and formats


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    found = np.asarray(pixels.to_rgb(in_mode(mode))).astype(int)
    grey = mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")
    expected = np.asarray(picture().convert("L").convert("RGB") if grey else picture()).astype(int)
    assert found.shape == expected.shape
    assert abs(found.mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 6
    if mode not in ("1", "P", "PA", "LAB"):  # dithered, or outside the range of 8-bit LAB
        assert abs(found - expected).max() <= 8


@pytest.mark.parametrize("name", WRITERS)
def test_every_mode_of_a_format(name: str, tmp_path: Path) -> None:
    written = 0
    for mode in MODES:
        try:
            data = encoded(in_mode(mode), name)
        except (OSError, ValueError, KeyError):  # this format does not have this mode
            continue
        if (name, mode) in UNREADABLE:
            continue
        found = read(data, tmp_path)
        clipped = mode.startswith("I;16") and name in ("webp", "webp-lossless", "gif", "avif", "ico", "icns")
        black = mode == "I" and name in (
            "ppm",
            "png",
            "ico",
            "icns",
        )  # written as 16 bits, of which only the low 8 are set
        if not clipped and not black:
            expected = np.asarray(pixels.to_rgb(in_mode(mode)))
            assert abs(found.mean(axis=(0, 1)) - expected.mean(axis=(0, 1))).max() < 8, mode
        written += 1
    assert written > 1


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=-1)
    grey = Image.fromarray(ramp)
    for name in ["png", "tiff", "tiff-lzw", "jpeg2000"]:
        assert np.array_equal(read(encoded(grey, name), tmp_path), expected), name
    big = Image.frombytes("I;16B", grey.size, ramp.astype(">u2").tobytes())
    assert np.array_equal(read(encoded(big, "tiff"), tmp_path), expected)
    assert np.array_equal(np.asarray(pixels.to_rgb(Image.fromarray(ramp.astype(np.int32)))), expected)
    pgm = b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes()
    assert np.array_equal(read(pgm, tmp_path), expected)
    assert np.array_equal(np.asarray(pixels.from_array(ramp)), expected)


def test_tiffs_of_12_bits_and_of_white_zeros(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    inverted = tiff_with(Image.fromarray(ramp), {262: 0})
    assert np.array_equal(read(inverted, tmp_path)[..., 0], 255 - (ramp >> 8).astype(np.uint8))
    twelve = tiff_with(Image.fromarray(np.full((4, 4), 0x8F8F, np.uint16)), {258: 12})  # 0x8F8 and 0xF8F by turns
    assert read(twelve, tmp_path)[0, :, 0].tolist() == [0x8F, 0xF8, 0x8F, 0xF8]


@pytest.mark.parametrize("depth", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["png", "tiff"])
def test_a_smaller_depth_in_sixteen_bits_is_not_black(name: str, depth: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**depth - 1, 256, dtype=np.uint16).reshape(16, 16)
    found = read(encoded(Image.fromarray(ramp), name), tmp_path)
    assert np.array_equal(found[..., 0], ramp >> (depth - 8))
    assert np.array_equal(found, np.asarray(pixels.from_array(ramp)))


def test_sixteen_bit_colour_and_grey_agree(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=">u2").reshape(256, 256)
    rows = np.repeat(ramp[..., None], 3, axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in rows)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0))
    transparent = png_chunk(b"tRNS", struct.pack(">HHH", 0x1234, 0x1234, 0x1234))
    image = png_chunk(b"IDAT", zlib.compress(lines)) + png_chunk(b"IEND", b"")
    expected = (rows >> 8).astype(np.uint8)
    assert np.array_equal(read(b"\x89PNG\r\n\x1a\n" + header + image, tmp_path), expected)
    found = read(b"\x89PNG\r\n\x1a\n" + header + transparent + image, tmp_path)
    assert np.array_equal(found[0x12, 0x34], [255, 255, 255])
    assert np.array_equal(found[0x13], expected[0x13])


def test_sixteen_bit_grey_with_a_transparent_value(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = read(encoded(Image.fromarray(ramp), "png", transparency=0x1234), tmp_path)
    assert found[0x12, 0x34].tolist() == [255, 255, 255]
    assert found[0x12, 0x33].tolist() == [0x12, 0x12, 0x12]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),  # up to 255: bytes
        ([0, 256, 65535], [0, 1, 255]),  # up to 65535: 16 bits
        ([0, 2048, 4095], [0, 128, 255]),  # up to 4095: 12 bits
        ([0, 65536, 131072], [0, 128, 255]),  # wider or negative: stretched
        ([-10, 0, 10], [0, 128, 255]),
        ([-(2**31), 0, 2**31 - 1], [0, 128, 255]),
        ([7, 7, 7], [7, 7, 7]),
        ([-7, -7, -7], [0, 0, 0]),
    ],
)
def test_integers(values: list[int], expected: list[int]) -> None:
    found = np.asarray(pixels.to_rgb(Image.fromarray(np.array([values], np.int32))))
    assert found[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 1, 255], [0, 1, 255]),  # whole numbers up to 255: bytes
        ([0, 1.5, 3], [0, 128, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 30000, 60000], [0, 128, 255]),
        ([np.nan, 0.5, np.inf], [0, 128, 255]),
        ([-np.inf, 0, 2.5], [0, 0, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([np.inf, -np.inf, np.inf], [255, 0, 255]),
        ([3e38, -3e38, np.nan], [255, 0, 0]),
    ],
)
def test_floats(values: list[float], expected: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(pixels.to_rgb(Image.fromarray(np.array([values], np.float32))))
    assert found[0, :, 0].tolist() == expected


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    rgba = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate([0, 128, 255]):
        rgba.putpixel((x, 0), (200, 0, 0, alpha))
    expected = [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    for name in ["png", "webp-lossless", "tiff", "tga", "jpeg2000", "qoi"]:
        assert read(encoded(rgba, name), tmp_path)[0].tolist() == expected, name
    for mode in ["RGBA", "RGBa"]:
        assert abs(np.asarray(pixels.to_rgb(rgba.convert(mode)))[0] - np.array(expected)).max() <= 1
    grey = np.asarray(pixels.to_rgb(rgba.convert("LA")))[0]
    assert grey[0].tolist() == [255, 255, 255]
    assert grey[2].tolist() == [60, 60, 60]


def test_palettes_with_transparent_entries(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    plain = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert read(encoded(image, "png"), tmp_path)[0].tolist() == plain
    assert read(encoded(image, "png", transparency=1), tmp_path)[0].tolist() == [plain[0], [255] * 3, plain[2]]
    assert read(encoded(image, "gif", transparency=1), tmp_path)[0].tolist() == [plain[0], [255] * 3, plain[2]]
    some = encoded(image, "png", transparency=bytes([0, 128, 255]))
    assert read(some, tmp_path)[0].tolist() == [[255] * 3, [127, 255, 127], plain[2]]


@pytest.mark.parametrize(("mode", "key"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0)])
def test_a_transparent_colour(mode: str, key: Any, tmp_path: Path) -> None:
    image = Image.new(mode, (2, 1), 255 if mode != "RGB" else (9, 9, 9))
    image.putpixel((0, 0), key)
    found = read(encoded(image, "png", transparency=key), tmp_path)
    assert found[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg_as_adobe_writes_it(tmp_path: Path) -> None:
    found = read(encoded(picture().convert("CMYK"), "jpeg", quality=95), tmp_path).astype(int)
    assert abs(found - np.asarray(picture()).astype(int)).mean() < 4


def test_a_colour_profile_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read(encoded(picture(), "png", icc_profile=profile), tmp_path), np.asarray(picture()))


@pytest.mark.parametrize("name", ["gif", "webp-lossless", "png", "tiff", "avif"])
def test_the_first_frame_of_several(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255)]]
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as file:
        assert getattr(file, "n_frames", 1) == 3
    assert abs(read(data, tmp_path).astype(int) - [255, 0, 0]).max() <= 2


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["jpeg", "png", "webp-lossless", "tiff", "tiff-lzw", "avif"])
def test_all_orientations(name: str, orientation: int, tmp_path: Path) -> None:
    upright = np.asarray(picture())
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(undo(upright)))
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "image"
    path.write_bytes(encoded(stored, name, exif=exif.tobytes()))
    found, facts = pixels.read(str(path), max_pixels=MAX, facts=["width", "height"])
    assert facts == {"width": 64, "height": 48}
    assert pixels.to_rgb(found) is found  # rotated once
    assert abs(np.asarray(found).astype(int) - upright).mean() < (4 if name in ("jpeg", "avif") else 0.1)


def test_heic_is_rotated_once(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[274] = 6
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(picture()), 1)))
    file = io.BytesIO()
    heif.from_pillow(stored).save(file, exif=exif.tobytes())
    found = read(file.getvalue(), tmp_path)
    assert found.shape == (48, 64, 3)
    assert abs(found.astype(int) - np.asarray(picture())).mean() < 6
    for length in (100, len(file.getvalue()) // 2, len(file.getvalue()) - 10):
        assert failure(file.getvalue()[:length], tmp_path).kind == "unreadable"


def test_heic_without_its_package_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = failure(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), tmp_path)
    assert error.kind == "no-decoder"
    assert "pip install 'capcli[heif]'" in str(error)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_corrupt_exif_is_ignored(exif: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ["png", "webp-lossless", "jpeg"]:
        assert read(encoded(picture(), name, exif=exif), tmp_path).shape == (48, 64, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(value: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = value
    assert np.array_equal(read(encoded(picture(), "png", exif=exif.tobytes()), tmp_path), np.asarray(picture()))


# Facts, arrays, limits


def test_facts_are_those_requested(tmp_path: Path) -> None:
    data = encoded(picture().convert("L"), "png")
    path = tmp_path / "image"
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    everything = {"width": 64, "height": 48, "format": "PNG", "mode": "L", "bytes": len(data), "sha256": digest}
    assert pixels.read(str(path), max_pixels=MAX, facts=pixels.FACTS)[1] == everything
    assert pixels.read(str(path), max_pixels=MAX, facts=["mode"])[1] == {"mode": "L"}
    assert pixels.read(str(path), max_pixels=MAX)[1] == {}


def test_a_file_too_large_for_memory_is_read_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("capcli.pixels.opening.IN_MEMORY", 100)
    for name in ["jpeg", "tiff", "tiff-lzw", "webp"]:
        data = encoded(picture(), name)
        path = tmp_path / "image"
        path.write_bytes(data)
        facts = pixels.read(str(path), max_pixels=MAX, facts=["sha256", "bytes"])[1]
        assert facts == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_arrays() -> None:
    colour = np.asarray(picture())
    assert np.array_equal(np.asarray(pixels.from_array(colour)), colour)
    assert np.array_equal(np.asarray(pixels.from_array(colour[::-1, ::2])), colour[::-1, ::2])
    assert np.array_equal(np.asarray(pixels.from_array(colour.astype(np.float64) / 255)), colour)
    assert np.array_equal(np.asarray(pixels.from_array(colour.astype(np.uint16) * 257)), colour)
    assert np.array_equal(np.asarray(pixels.from_array((colour.astype(np.uint16) * 257).astype(">u2"))), colour)
    assert np.asarray(pixels.from_array(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    assert np.asarray(pixels.from_array(np.full((2, 2, 1), 9, np.uint8))).shape == (2, 2, 3)
    assert np.asarray(pixels.from_array(np.array([[[9, 9, 9, 0]]], np.uint8))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 5, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((1, 5, 5, 3), np.uint8),
        np.zeros((5, 5), np.int64),
        np.zeros((5, 5), np.complex64),
        np.full((5, 5), 1.5),
        np.full((5, 5), -0.1),
        np.full((5, 5), np.nan),
        np.full((5, 5), "x"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_that_are_not_images(array: np.ndarray) -> None:
    with pytest.raises(ImageError) as caught:
        pixels.from_array(array)
    assert_readable(caught.value)


def test_an_upright_rgb_image_is_not_copied() -> None:
    image = picture()
    assert pixels.to_rgb(image) is image


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes(size: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(encoded(picture(*size), "png"))
    assert pixels.load(str(tmp_path / "image"), SPEC, max_pixels=MAX)[0].shape == (224, 224, 3)


def icon_holding(png: bytes) -> bytes:
    """An icon whose header gives 16x16."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def gif_with_a_frame_of(width: int, height: int) -> bytes:
    """A screen of 1x1 with a larger first frame."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\x00;"


@pytest.mark.parametrize(
    "data",
    [
        png_claiming(100_000, 100_000),
        png_claiming(2**31 - 1, 2**31 - 1),
        icon_holding(png_claiming(100_000, 100_000)),
        tiff_with(picture(), {256: 100_000, 257: 100_000}),
        tiff_with(picture(), {256: 2**31, 257: 2**31}),
        gif_with_a_frame_of(65535, 65535),
        b"BM" + struct.pack("<IIIIiiHHIIIIII", 0, 0, 54, 40, 200_000, 200_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"P6 300000 300000 255\n" + bytes(1000),
        b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3) + bytes(100),
    ],
    ids=["png", "png-widest", "icon", "tiff", "tiff-widest", "gif", "bmp", "ppm", "psd"],
)
def test_bombs_are_refused_before_they_are_decoded(data: bytes, tmp_path: Path) -> None:
    tracemalloc.start()
    error = failure(data, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.kind == "too-large", error
    assert str(MAX) in str(error)
    assert peak < 20_000_000


def test_max_pixels_is_the_limit_and_pillows_settings_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(picture(), "png")
    assert read(data, tmp_path, max_pixels=64 * 48).shape == (48, 64, 3)
    assert failure(data, tmp_path, max_pixels=64 * 48 - 1).kind == "too-large"
    assert failure(data[: len(data) // 2], tmp_path).kind == "unreadable"
    assert pixels.to_rgb(picture()).size == (64, 48)
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


# Damage


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_files_are_failures(name: str, tmp_path: Path) -> None:
    if name == "dds" and OLD_PILLOW:
        pytest.skip("Pillow before 13 accepts a truncated DDS")
    data = encoded(picture(), name)
    whole = read(data, tmp_path)
    for part in [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97]:
        cut = data[: int(len(data) * part)]
        try:
            found = read(cut, tmp_path)
        except ImageError as error:
            assert_readable(error)
            continue
        assert np.array_equal(found, whole), part  # what was cut off is not part of the image


@pytest.mark.parametrize("name", ["jpeg", "progressive", "png"])
def test_a_file_whose_end_was_never_written(name: str, tmp_path: Path) -> None:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[270] = "\xff\xd9"
    data = encoded(noisy, name, exif=exif.tobytes())
    for part in [0.3, 0.5, 0.7, 0.95]:
        kept = data[: int(len(data) * part)]
        assert failure(kept + bytes(len(data) - len(kept)), tmp_path).kind == "unreadable"
    assert np.array_equal(read(data + bytes(4096), tmp_path), read(data, tmp_path))


def test_damaged_tiffs_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = encoded(picture(), "tiff-lzw")
    assert failure(data.replace(data[20:40], b"\xff" * 20), tmp_path).kind == "unreadable"
    os.write(2, b"still open")
    assert capfd.readouterr() == ("", "still open")


def test_files_that_are_not_images(tmp_path: Path) -> None:
    assert failure(b"", tmp_path).kind == "empty"
    assert failure(b"\0", tmp_path).kind == "unknown-format"
    assert failure(b"<!DOCTYPE html><html>403</html>", tmp_path).kind == "unknown-format"
    assert failure(b"plain text\n" * 100, tmp_path).kind == "unknown-format"
    assert failure(os.urandom(10) + bytes(5000), tmp_path).kind in ("unknown-format", "unreadable")
    assert failure(encoded(picture(), "jpeg")[:30], tmp_path).kind == "unreadable"
    assert failure(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", tmp_path).kind == "no-decoder"


def test_paths_without_an_image_file(tmp_path: Path) -> None:
    assert failure_at(str(tmp_path)).kind == "not-a-file"
    assert failure_at(str(tmp_path / "missing")).kind == "missing"
    assert failure_at(str(tmp_path / "a\0b")).kind == "missing"
    assert failure_at(str(tmp_path / ("x" * 300))).kind == "missing"
    assert failure_at("/dev/zero").kind == "not-a-file"
    os.mkfifo(tmp_path / "pipe")
    assert failure_at(str(tmp_path / "pipe")).kind == "not-a-file"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert failure_at(str(tmp_path / "loop")).kind == "missing"
    (tmp_path / "file").write_bytes(b"x")
    assert failure_at(str(tmp_path / "file" / "below")).kind == "missing"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"x")
    (tmp_path / "image").chmod(0)
    assert failure_at(str(tmp_path / "image")).kind == "permission"


@pytest.mark.parametrize("name", [b"two\nlines.png", b"not utf-8 \xff\xfe.png", "日本語.jpg".encode(), b"-rf *"])
def test_names_of_any_bytes(name: bytes, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    with open(path, "wb") as file:
        file.write(encoded(picture(), "png"))
    assert pixels.load(path, SPEC, max_pixels=MAX)[0].shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (MemoryError(), "out-of-memory"),
        (RecursionError("deep"), "unreadable"),
        (struct.error("bad"), "unreadable"),
        (SyntaxError("not a\nPNG <_io.BytesIO object at 0x7f00>"), "unreadable"),
        (NotImplementedError(), "unreadable"),
        (AssertionError(), "unreadable"),
        (OSError(5, "Input/output error"), "unreadable"),
    ],
)
def test_every_exception_of_a_codec_is_a_failure(
    raised: Exception, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_image: Image.Image) -> None:
        raise raised

    monkeypatch.setattr(reading, "upright_rgb", decode)
    assert failure(encoded(picture(), "png"), tmp_path).kind == kind


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_a_failure(
    raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_image: Image.Image) -> None:
        raise raised

    (tmp_path / "image").write_bytes(encoded(picture(), "png"))
    monkeypatch.setattr(reading, "upright_rgb", decode)
    with pytest.raises(raised):
        pixels.load(str(tmp_path / "image"), SPEC, max_pixels=MAX)


@pytest.fixture(scope="module")
def samples() -> list[bytes]:
    files = [encoded(picture(), name) for name in WRITERS if name != "icns"]
    exif = Image.Exif()
    exif[274], exif[270] = 6, "a description"
    files += [encoded(picture(), name, exif=exif.tobytes()) for name in ["jpeg", "png", "webp", "tiff"]]
    files += [encoded(picture().convert("P"), name, transparency=3) for name in ["png", "gif"]]
    return files


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_an_image_or_a_failure(data: st.DataObject, samples: list[bytes], tmp_path: Path) -> None:
    damaged = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, min(len(damaged) - 1, data.draw(st.sampled_from([40, 400, 10**6])))))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))]
    assert_image_or_failure(bytes(damaged), tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    head=st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\1\0WEBPVP8 ", b"II*\0", b"BM"]
    ),
    tail=st.binary(max_size=400),
)
def test_random_bytes_give_an_image_or_a_failure(head: bytes, tail: bytes, tmp_path: Path) -> None:
    assert_image_or_failure(head + tail, tmp_path)


def assert_image_or_failure(data: bytes, folder: Path) -> None:
    path = folder / "image"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        try:
            found, facts = pixels.load(str(path), SPEC, max_pixels=MAX, facts=pixels.FACTS)
        except ImageError as error:
            assert_readable(error)
        else:
            assert found.shape == (224, 224, 3)
            assert set(facts) == set(pixels.FACTS)
    assert not shown


# The process it runs in


def test_decoder_processes_stay_light() -> None:
    heavy = "[name for name in ('torch', 'transformers', 'pillow_heif') if name in sys.modules]"
    code = f"import sys; import capcli.pixels; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@given(*[st.integers(1, 300)] * 4, st.sampled_from([1, 2, 3, 4, 5]))
@settings(deadline=None, max_examples=150)
def test_two_passes_in_pillows_order_equal_one_resize(
    width: int, height: int, columns: int, rows: int, resample: int
) -> None:
    image = Image.effect_noise((width, height), 100)
    first = (width, rows) if pixels.columns_first(image.size, (columns, rows)) else (columns, height)
    twice = image.resize(first, resample).resize((columns, rows), resample)
    assert twice.tobytes() == image.resize((columns, rows), resample).tobytes()


@pytest.mark.parametrize("size", [(40, 900), (900, 40), (300, 310)], ids=str)
def test_strips_equal_a_whole_resize(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    spec = PixelSpec.from_config(
        {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 30}
    )
    whole = pixels.resize(Image.fromarray(noise), spec)
    monkeypatch.setattr(resizing, "WHOLE_RESIZE", 2000)
    assert np.array_equal(pixels.resize(Image.fromarray(noise), spec), whole)
