"""Captions in a text file beside each image, or in a separate folder with the same structure."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from enum import Enum, auto

from capcli.errors import CapcliError, ImageError
from capcli.options import Existing, Suffix
from capcli.records import Entry
from capcli.sinks.keys import Keys, key
from capcli.storage import atomic
from capcli.text import printable, raw_bytes

KIND = "sidecar"  # the error code of an image whose text file cannot be written
STOPPING = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}  # with these no file can be written
_BLANK = b"\xef\xbb\xbf \t\r\n\0"
_MARK = b"\xef\xbb\xbf"  # all that some editors write into an empty file


class Claim(Enum):
    """Whose text file an image's is."""

    OWN = auto()
    TAKEN = auto()  # that of another image with the same stem
    REPEATED = auto()  # its own, and the image is listed a second time under another name


class Sidecars:
    """One file per image. Images with the same stem share a text file, which is written for the first of them.

    `existing` states what happens to a text file that already has text: "skip" leaves it, "append" adds the captions to its
    first line after `separator`.
    """

    def __init__(
        self, suffix: Suffix, folder: str | None, existing: Existing, separator: str, warn: Callable[[str], None]
    ) -> None:
        self._suffix = suffix
        self._folder = folder
        self._existing = existing
        self._separator = separator
        self._warn = warn
        self._claimed = Keys()  # text files
        self._images = Keys()  # paths of images that have one of them
        self._without: dict[int, Claim] = {}  # images, by name, whose text file is not to be written for them
        self._folders = Keys()
        self._unswept: list[str] | None = []  # folders claimed before `begin`

    def path(self, entry: Entry) -> str:
        """The text file of an image. With a folder given it is inside that folder, whatever the name."""
        image = entry.path if self._folder is None else os.path.join(self._folder, _inside(entry.name))
        stem, suffix = os.path.splitext(image)
        return (image if suffix.lower() == self._suffix else stem) + self._suffix

    def begin(self) -> None:
        """From now on, remove the temporary files of killed runs from the folders of the text files."""
        for folder in self._unswept or ():
            atomic.remove_abandoned(folder)
        self._unswept = None

    def claim(self, entry: Entry) -> Claim:
        """Whose the text file of this image is. Call it once for each image, in the order of the source."""
        path = os.path.normpath(self.path(entry))
        self._sweep(os.path.dirname(path))
        target, image = (key(raw_bytes(each)) for each in (path, os.path.normpath(entry.path)))
        if target not in self._claimed:
            self._claimed.add(target)
            self._images.add(image)
            return Claim.OWN
        claim = Claim.REPEATED if image in self._images else Claim.TAKEN
        self._without[key(raw_bytes(entry.name))] = claim
        return claim

    def report_clash(self, entry: Entry) -> None:
        """Warn that the image has a row and no text file."""
        self._warn(f"{printable(entry.name)}: {self._clash(entry)}")

    def keeps(self, entry: Entry) -> bool:
        """Whether there is a text file with text that is to be left as it is."""
        return self._existing == "skip" and _has_text(self.path(entry))

    def problem(self, entry: Entry, *, clashes: bool) -> str | None:
        """Why the text file of this image cannot be written, as far as that can be known without trying.

        With `clashes` also because it is another image's.
        """
        claim = self._without.get(key(raw_bytes(entry.name)))
        if claim is Claim.TAKEN and clashes:
            return self._clash(entry)
        if claim is not None or self.keeps(entry):
            return None
        path = self.path(entry)
        folder = os.path.dirname(path) or os.curdir
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                return _not_written(path, "it is a folder")
        except FileNotFoundError:
            pass
        except OSError as error:
            return _not_written(path, error.strerror)
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            return _not_written(path, "no permission to write in its folder")
        return None

    def write(self, entry: Entry, texts: Sequence[str]) -> None:
        """Write the text file atomically. Writing the same captions twice has no effect.

        Raises ImageError where it cannot be written, CapcliError where none can.
        """
        if key(raw_bytes(entry.name)) in self._without or self.keeps(entry):
            return
        path = self.path(entry)
        lines = [" ".join(text.splitlines()) for text in texts]
        try:
            if self._folder is not None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            before = _content(path) if self._existing == "append" else b""
            data = _appended(before, lines, self._separator) if before.strip(_BLANK) else _encoded(lines)
            if data != before:
                atomic.replace(path, [data])
        except OSError as error:
            message = _not_written(path, error.strerror or error)
            if error.errno in STOPPING:
                raise CapcliError(message) from error
            raise ImageError(KIND, message) from error
        except ValueError as error:
            raise ImageError(KIND, _not_written(path, error)) from None

    def _clash(self, entry: Entry) -> str:
        return f"no text file written, {printable(self.path(entry))} belongs to an image of the same stem"

    def _sweep(self, folder: str) -> None:
        item = key(raw_bytes(folder))
        if item in self._folders:
            return
        self._folders.add(item)
        if self._unswept is None:
            atomic.remove_abandoned(folder)
        else:
            self._unswept.append(folder)


def _not_written(path: str, reason: object) -> str:
    return f"cannot write the text file {printable(path)}: {reason}"


def _has_text(path: str) -> bool:
    """Whether it is a file that is not empty. An empty caption is a line break: its file is not empty."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size != len(_MARK):
            return stat.S_ISREG(status.st_mode) and status.st_size > 0
        with open(path, "rb") as file:
            return file.read() != _MARK
    except OSError:
        return False


def _content(path: str) -> bytes:
    """The content of a file, empty where there is none. Raises OSError, also for a link, and ValueError for a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return b""
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("it is a link, which is not followed") from None
        raise
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return file.read()


def _encoded(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")


def _appended(before: bytes, lines: Sequence[str], separator: str) -> bytes:
    """The content with the captions at the end of its first line, unless they are there. Raises ValueError."""
    if before.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("its text is UTF-16: captions are appended to UTF-8 only")
    between = separator.encode("utf-8", "replace")
    added = between.join(line.encode("utf-8", "replace") for line in lines)
    if not added.isascii():
        try:
            before.decode()
        except UnicodeDecodeError:
            raise ValueError("its text is not UTF-8: captions are appended to UTF-8 only") from None
    first, _, rest = before.partition(b"\n")
    end = b"\r\n" if first.endswith(b"\r") else b"\n"
    first = first.removesuffix(b"\r")
    if first == added or first.endswith(between + added) or before.startswith(first + between + added + b"\n"):
        return before
    return first + (between if first.strip(_BLANK) else b"") + added + end + rest


def _inside(name: str) -> str:
    """The name as a relative path that stays within its folder."""
    return os.path.normpath(os.sep + os.path.splitdrive(name)[1]).lstrip(os.sep)
