"""`captions.images.bin`: size, time and hash of each captioned image's file, from which --refresh sees what has changed.

32 bytes per image, appended before the image's row. Rows of earlier versions have no entry: for those the header has the time
of the last write to the captions file before this one was created.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
from dataclasses import dataclass, replace

import numpy as np

from capcli.errors import CapcliError
from capcli.records import Stamp
from capcli.sinks.keys import Keys
from capcli.storage import atomic
from capcli.text import printable, raw_bytes

_MAGIC = b"capcli.1"
_HEADER = struct.Struct("<8sqqq")  # magic, time of the earlier rows in nanoseconds, two unused numbers
_ENTRY = np.dtype([("key", "<u8"), ("size", "<u8"), ("modified", "<i8"), ("hash", "<u8")])


@dataclass(frozen=True, slots=True)
class _Known:
    """The latest entry of each image, sorted by key."""

    entries: np.ndarray

    @classmethod
    def of(cls, entries: np.ndarray) -> _Known:
        _, from_end = np.unique(entries["key"][::-1], return_index=True)
        return cls(entries[len(entries) - 1 - from_end])

    def find(self, item: int) -> np.void | None:
        at = int(np.searchsorted(self.entries["key"], np.uint64(item)))
        found = at < len(self.entries) and int(self.entries["key"][at]) == item
        return self.entries[at] if found else None


class ImageRecord:
    """The record beside a captions file, protected by the lock of that file. A link in its place is replaced."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._begun = False
        self._rows_written = 0  # when the rows without an entry were written, in nanoseconds
        self._known: _Known | None = None

    def load(self, out: str) -> None:
        """Read the entries, for `changed`. `out` is the captions file."""
        self._rows_written = _modified(out)
        entries = np.empty(0, _ENTRY)
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                content = file.read() if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        except OSError:
            content = b""
        if len(content) >= _HEADER.size and content.startswith(_MAGIC):
            self._rows_written = _HEADER.unpack_from(content)[1]
            entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)[1:]
        self._known = _Known.of(entries[entries["key"] != 0])

    def begin(self, out: str, *, overwrite: bool) -> None:
        """Prepare for `add`, which creates the record. Raises CapcliError."""
        self._rows_written = 0 if overwrite else _modified(out)
        try:
            with contextlib.suppress(FileNotFoundError):
                if overwrite or not _is_ours(self._path):
                    os.unlink(self._path)
        except OSError as error:
            raise self._not_written(error) from error
        self._begun = True

    def add(self, name: str, stamp: Stamp) -> None:
        """Append the state of an image's file. Raises CapcliError."""
        if not self._begun:
            return
        entry = np.array((image_key(name), stamp.size, stamp.modified, stamp.hash), _ENTRY)
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            if os.write(self._descriptor, entry.tobytes()) < _ENTRY.itemsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._not_written(error) from error

    def changed(self, name: str, path: str, stamp: Stamp) -> bool:
        """Whether the image's file has another content than when it was captioned, or may have where that is unknown."""
        before = self._known.find(image_key(name)) if self._known else None
        if before is None:
            if stamp.modified > self._rows_written:
                return True
            self.add(name, stamp)
            return False
        if (int(before["size"]), int(before["modified"])) == (stamp.size, stamp.modified):
            return False
        known = int(before["hash"])
        if int(before["size"]) != stamp.size or not known or known != content_hash(path):
            return True
        self.add(name, replace(stamp, hash=known))
        return False

    def rewrite(self, kept: Keys) -> None:
        """Leave one entry for each image in `kept`, keys of `image_key`. Raises CapcliError."""
        try:
            with open(self._path, "rb", opener=atomic.open_no_link) as file:
                content = file.read()
        except FileNotFoundError:
            return
        try:
            entries = np.frombuffer(content[: len(content) // _ENTRY.itemsize * _ENTRY.itemsize], _ENTRY)[1:]
            latest = _Known.of(entries[entries["key"] != 0]).entries
            wanted = latest[np.fromiter((int(item) in kept for item in latest["key"]), np.bool_, len(latest))]
            if len(wanted) < len(entries):
                atomic.replace(self._path, [content[: _HEADER.size], wanted.tobytes()])
        except OSError as error:
            raise self._not_written(error) from error

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        """The record to append to, without a last entry that a killed run left incomplete. Raises OSError."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        size = os.fstat(descriptor).st_size
        if size < _HEADER.size:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _HEADER.pack(_MAGIC, self._rows_written, 0, 0))
        elif size % _ENTRY.itemsize:
            os.ftruncate(descriptor, size - size % _ENTRY.itemsize)
        return descriptor

    def _not_written(self, error: OSError) -> CapcliError:
        return CapcliError(f"cannot write {printable(self._path)}: {error.strerror or error}")


def image_key(name: str) -> int:
    """A hash of the name that is the same in every process; never 0."""
    return int.from_bytes(hashlib.blake2b(raw_bytes(name), digest_size=8).digest(), "little") or 1


def short_hash(sha256: str) -> int:
    """The hash in an entry: the first 8 bytes of the file's SHA-256; never 0, which stands for an unknown hash."""
    return int(sha256[:16], 16) or 1


def content_hash(path: str) -> int:
    """`short_hash` of a file; 0 where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return short_hash(hashlib.file_digest(file, "sha256").hexdigest())
    except OSError:
        return 0


def _modified(path: str) -> int:
    """When the file was last written to, in nanoseconds; 0 where it is empty or there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_mtime_ns if status.st_size else 0


def _is_ours(path: str) -> bool:
    """Whether it is a record, or the beginning of one. Raises FileNotFoundError where there is nothing."""
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return False
    with open(path, "rb") as file:
        head = file.read(len(_MAGIC))
    return _MAGIC.startswith(head) or head == _MAGIC
