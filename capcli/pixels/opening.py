"""Open regular image files and read their headers; nothing is decoded yet."""

from __future__ import annotations

import errno
import io
import os
import stat

from PIL import Image, ImageFile, UnidentifiedImageError

from capcli.errors import CapcliError, ImageError
from capcli.imports import importing

IN_MEMORY = 64 << 20  # files up to this many bytes are read whole; of larger ones Pillow reads what it needs
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
NO_DECODER = {
    "EPS": "it is a PostScript program, which capcli does not run: convert it to PNG",
    "MPEG": "it is a video: extract a frame from it",
}
BEGINNINGS: dict[str, bytes | tuple[bytes, ...]] = {
    "JPEG": b"\xff\xd8",
    "PNG": b"\x89PNG",
    "GIF": b"GIF8",
    "WebP": b"RIFF",
    "TIFF": (b"II*\0", b"MM\0*"),
    "BMP": b"BM",
    "PSD": b"8BPS",
}
ZERO_TAIL = 32  # bytes; no encoder ends its image data with that many zeros


class _StaysOpen:
    """A file that only its `with` block closes: some plugins of Pillow close the file that they are given."""

    def close(self) -> None:
        """Does nothing."""

    def __exit__(self, *_: object) -> None:
        super().close()  # type: ignore[misc]


class MemoryFile(_StaysOpen, io.BytesIO):
    """The bytes of an image file."""


class DiskFile(_StaysOpen, io.BufferedReader):
    """An image file that is too large to be read whole."""


Stream = MemoryFile | DiskFile


def open_image(source: str | bytes) -> Stream:
    """A stream of an image file, from its path or its bytes.

    Raises:
        ImageError: missing, not-a-file, permission, empty, or unreadable.
    """
    if isinstance(source, str):
        return open_regular(source)
    if not source:
        raise ImageError("empty", "the file is empty")
    return MemoryFile(source)


def open_regular(path: str) -> Stream:
    """Open the regular file at `path` without blocking: opening a pipe that has no writer would block.

    Raises:
        ImageError: missing, not-a-file, permission, empty, or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or characters that the file system cannot encode
        raise ImageError("missing", "no file can have this name") from error
    except OSError as error:
        raise _open_failure(error) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        os.close(descriptor)
        raise _not_an_image_file(status.st_mode)
    file = DiskFile(io.FileIO(descriptor))
    if status.st_size > IN_MEMORY:
        return file
    with file:
        return MemoryFile(file.read(status.st_size))  # no more, if it is growing


def _not_an_image_file(mode: int) -> ImageError:
    if stat.S_ISREG(mode):
        return ImageError("empty", "the file is empty")
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    return ImageError("not-a-file", f"it is {kind}, not a file")


def _open_failure(error: OSError) -> ImageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return ImageError("missing", "there is no such file (or it is a broken link)")
    if isinstance(error, PermissionError):
        return ImageError("permission", "no permission to read the file")
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return ImageError("not-a-file", "it is a socket or device, not a file")
    return ImageError("unreadable", f"the file could not be opened: {error.strerror}")


def identify(stream: Stream) -> ImageFile.ImageFile:
    """The image in `stream`, its header read and nothing decoded.

    Raises:
        ImageError: unknown-format, no-decoder, or unreadable (a damaged header, or an end that was never written).
    """
    stream.seek(0)
    head = stream.read(64)
    try:
        image = _open_heif(stream) if _is_heif(head) else Image.open(stream)
    except UnidentifiedImageError as error:
        raise _unidentified(head) from error
    if image.format in NO_DECODER:
        raise ImageError("no-decoder", f"{image.format} cannot be decoded: {NO_DECODER[image.format]}")
    if isinstance(image, ImageFile.StubImageFile):
        raise ImageError("no-decoder", f"{image.format} cannot be decoded here: convert it to PNG")
    if image.format in ("JPEG", "MPO", "PNG") and _ends_unwritten(stream, image.format):
        raise ImageError("unreadable", f"{image.format} cannot be decoded: it is truncated, its end is all zeros")
    return image


def _unidentified(head: bytes) -> ImageError:
    for name in BEGINNINGS:
        if head.startswith(BEGINNINGS[name]):
            return ImageError("unreadable", f"it starts like {name}, but its header is damaged or truncated")
    return ImageError("unknown-format", "it is not an image in any supported format")


def _is_heif(head: bytes) -> bool:
    if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS:
        return False
    compatible = head[16 : int.from_bytes(head[:4], "big")]
    return not any(compatible[start : start + 4] in (b"avif", b"avis") for start in range(0, len(compatible), 4))


def _open_heif(stream: Stream) -> ImageFile.ImageFile:
    install = "pip install 'capcli[heif]'"
    missing = f"HEIC needs an extra package: {install}"
    try:
        with importing("pillow_heif", "pillow-heif", missing, "pip install --force-reinstall pillow-heif"):
            from pillow_heif import HeifImageFile
    except CapcliError as error:
        raise ImageError("no-decoder", str(error)) from error
    stream.seek(0)
    try:
        image: ImageFile.ImageFile = HeifImageFile(stream)  # type: ignore[no-untyped-call]
    except SyntaxError as error:  # pillow-heif raises it for every kind of damage
        raise ImageError("unreadable", "it starts like HEIF, but its header is damaged or truncated") from error
    return image


def _ends_unwritten(stream: Stream, format_name: str) -> bool:
    """Whether the end of a file was never written, as when a copy into reserved space is interrupted.

    Decoders of JPEG and PNG accept zeros as image data and would return a partial image. The test: the file ends in
    zeros, and there is no end marker after the start of the image data. (Zeros after the end marker are padding.)
    """
    stream.seek(-min(ZERO_TAIL, stream.seek(0, os.SEEK_END)), os.SEEK_END)
    if stream.read().strip(b"\0"):
        return False
    stream.seek(0)
    data = stream.read()
    if format_name == "PNG":
        return b"IEND" not in data
    start = 2
    while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":  # markers up to start of scan
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return data.find(b"\xff\xd9", start) < 0
