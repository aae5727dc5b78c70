"""An append-only file of records that survives a kill: lock it, read it once, cut off a torn record, append."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from capcli.errors import CapcliError, UsageError
from capcli.sinks.row_formats import LONGEST, ForeignRowError, Rows
from capcli.storage import atomic, locks
from capcli.text import printable

_SYNC_SECONDS = 5.0
_CHECK_SECONDS = 1.0
_BLOCK = 1 << 18


class Journal:
    """One file of records. The order of calls is open, keys, begin, append or replace, close.

    Nothing on disk changes before `begin`. `option` is the option that named the file, for messages. A link is followed if the
    user `named` it, otherwise it is replaced by a file. Every method raises CapcliError where the file cannot be read or
    written, or was removed meanwhile; the records on disk are complete even then.
    """

    def __init__(self, path: str, option: str, *, named: bool = True) -> None:
        self.path = path
        self._shown = printable(path)
        self._option = option
        folder, name = os.path.split(path)
        # A link that the user named stays one when the file is replaced.
        self._real = os.path.realpath(path) if named else os.path.join(os.path.realpath(folder), name)
        self._descriptor: int | None = None
        self._end = 0  # bytes of complete records
        self._unsynced = False
        self._synced = self._checked = time.monotonic()

    @property
    def empty(self) -> bool:
        return self._end == 0

    @property
    def exists(self) -> bool:
        return self._descriptor is not None

    def open(self) -> None:
        """Lock the file if it exists. Raises UsageError where it cannot be an output of capcli."""
        if not os.path.basename(self.path) or os.path.isdir(self._real):
            raise UsageError(f"{self._option} {self._shown} is a folder: name a file in it")
        if os.path.islink(self._real) or not os.path.exists(self._real):
            self._check_folder()
            return
        if not os.path.isfile(self._real):
            raise UsageError(f"{self._option} {self._shown} is not a regular file; - writes to standard output")
        try:
            self._descriptor = os.open(self._real, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise UsageError(f"{self._option} {self._shown} cannot be written: {error.strerror}") from None
        self._lock(self._descriptor)
        self._end = os.fstat(self._descriptor).st_size
        if not locks.is_current(self._descriptor, self._real):
            raise self._in_use()

    def starts_with(self, head: bytes) -> bool:
        if self._descriptor is None:
            return False
        with self._reader() as stream:
            return stream.read(len(head)) == head

    def names(self, rows: Rows) -> Iterator[bytes]:
        """All names in the file, raw, in order. Also finds where a torn record begins.

        Raises UsageError for a file that capcli did not write, CapcliError for damage other than a torn record.
        """
        if self._descriptor is None:
            return
        self._end = 0
        try:
            with self._faults("read"), self._reader() as stream:
                for name, self._end in _complete_records(stream, rows):
                    if name is not None:
                        yield name
        except ForeignFileError as error:
            raise UsageError(
                f"{self._shown} has other rows than this command writes: {error}; {self._ways_out()}"
            ) from None
        except DamageError as error:
            raise CapcliError(f"{self._shown}, {error}. Repair or delete that line, or {self._ways_out()}") from None

    def records(self, rows: Rows) -> Iterator[bytes]:
        """The complete records, raw."""
        with self._reader() as stream:
            stream.seek(len(rows.header))
            yield from rows.records(_lines(stream, self._end - len(rows.header)))

    def record(self, start: int, size: int) -> bytes:
        """The complete record at this place, raw."""
        with self._faults("read"):
            return os.pread(self._fd, size, start)

    def begin(self, *, overwrite: bool = False) -> int:
        """Create the file, cut off a torn record, or with `overwrite` everything. Returns the number of bytes cut off."""
        if self._descriptor is None:
            self._create()
            return 0
        self._end = 0 if overwrite else self._end
        with self._faults():
            torn = os.fstat(self._descriptor).st_size - self._end
            if torn:
                os.ftruncate(self._descriptor, self._end)
                os.fsync(self._descriptor)
        return torn

    def append(self, record: bytes) -> None:
        """Append one record, usually in one system call. The partial record of a failed write is removed."""
        if self._descriptor is None:
            self._create()
        with self._faults():
            try:
                os.lseek(self._fd, self._end, os.SEEK_SET)
                left = memoryview(record)
                while left:  # after a short write the next one raises the reason
                    left = left[os.write(self._fd, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # if this fails too, the next run cuts it off
                    os.ftruncate(self._fd, self._end)
                raise
            self._end += len(record)
            self._unsynced = True
            now = time.monotonic()
            if now - self._synced > _SYNC_SECONDS:
                self._sync()
        if now - self._checked > _CHECK_SECONDS:
            self.check()

    def sync(self) -> None:
        """Sync all records to disk."""
        with self._faults():
            self._sync()

    def replace(self, chunks: Iterable[bytes]) -> None:
        """Replace the whole file atomically. It stays locked throughout."""
        with self._faults():
            temporary, new = atomic.write(self._real, chunks, self._copy_mode)
            try:
                atomic.settle(temporary, self._real)
            except OSError:
                os.close(new)
                raise
            os.close(self._fd)
            self._descriptor = new
            self._end = os.fstat(new).st_size

    def remove(self) -> None:
        """Delete the file. The next record creates it again."""
        if self._descriptor is None:
            return
        with self._faults():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._real)
            os.close(self._descriptor)
        self._descriptor, self._end, self._unsynced = None, 0, False
        atomic.sync_folder(os.path.dirname(self._real))

    def check(self) -> None:
        """Raises CapcliError where the file was removed or replaced: what is written would be lost."""
        self._checked = time.monotonic()
        if self._descriptor is not None and not locks.is_current(self._descriptor, self._real):
            raise CapcliError(
                f"{self._shown} was removed or replaced while this run wrote to it, and the rows since are lost: run the "
                "same command again"
            )

    def close(self) -> None:
        """Sync all records to disk, unlock and close the file."""
        if self._descriptor is None:
            return
        try:
            self.sync()
            self.check()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _fd(self) -> int:
        if self._descriptor is None:
            raise ValueError("the journal is not open")
        return self._descriptor

    def _check_folder(self) -> None:
        """Raises UsageError where the file cannot be created, as far as that can be known without trying."""
        folder = os.path.dirname(self._real)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise UsageError(f"{self._option} {self._shown}: {printable(folder)} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{self._option} {self._shown}: no permission to write in {printable(folder)}")

    def _create(self) -> None:
        folder = os.path.dirname(self._real)
        with self._faults():
            os.makedirs(folder, exist_ok=True)
            if os.path.islink(self._real):
                os.unlink(self._real)
            try:
                self._descriptor = os.open(self._real, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # another run has created it since `open`
                raise self._in_use() from None
        self._lock(self._descriptor)
        atomic.sync_folder(folder)

    def _lock(self, descriptor: int) -> None:
        if not locks.take(descriptor):
            raise self._in_use()

    def _copy_mode(self, new: int) -> None:
        """Give the file that is going to replace this one the same permissions."""
        os.fchmod(new, os.fstat(self._fd).st_mode & 0o7777)

    def _sync(self) -> None:
        if self._unsynced:
            os.fsync(self._fd)
        self._unsynced = False
        self._synced = time.monotonic()

    def _reader(self) -> BinaryIO:
        stream = io.BufferedReader(io.FileIO(self._fd, closefd=False), _BLOCK)
        stream.seek(0)
        return stream

    def _ways_out(self) -> str:
        return f"choose another {self._option}, or start from scratch with --overwrite"

    def _in_use(self) -> CapcliError:
        return CapcliError(
            f"{self._shown} is being written by another run: wait until it ends, or choose another {self._option}"
        )

    @contextlib.contextmanager
    def _faults(self, action: str = "write") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CapcliError(
                f"cannot {action} {self._shown}: {reason}. All rows in it are complete; the same command resumes the run"
            ) from error


class ForeignFileError(Exception):
    """capcli did not write the file; the message states the difference."""


class DamageError(Exception):
    """A damaged record with others after it: not the result of a kill."""


def _complete_records(stream: BinaryIO, rows: Rows) -> Iterator[tuple[bytes | None, int]]:
    """For the header (name None) and each complete record: the raw name, and the byte where it ends.

    Raises ForeignFileError and DamageError.
    A kill leaves a last record that is incomplete; a power failure also leaves NULs where data was not yet on disk.
    """
    size = _size_without_nuls(stream)
    if not _skip_header(stream, rows, size):
        return
    end, line = len(rows.header), 1 + rows.header.count(b"\n")
    if end:
        yield None, end
    records = rows.records(_lines(stream, size - end))
    for record in records:
        try:
            name = rows.name(record)
        except ValueError as error:
            foreign = isinstance(error, ForeignRowError)
            if not foreign and next(records, None) is None and _is_torn(rows, record, first=end == 0):
                return
            if end == 0:
                raise ForeignFileError(f"line 1: {error}") from None
            raise DamageError(f"line {line} is damaged: {error}") from None
        end += len(record)
        yield name, end
        line += record.count(b"\n")


def _lines(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes as lines, split where a line is longer than any row."""
    while size > 0 and (line := stream.readline(min(size, LONGEST))):
        size -= len(line)
        yield line


def _skip_header(stream: BinaryIO, rows: Rows, size: int) -> bool:
    """Move past the header; False where the file has only a part of it. Raises ForeignFileError for another one."""
    head = stream.read(min(size, max(map(len, rows.headers))))
    stream.seek(len(rows.header))
    if head.startswith(rows.header):
        return True
    if len(head) == size and any(header.startswith(head) for header in rows.headers):
        return False
    stream.seek(0)
    found = stream.readline(LONGEST).rstrip(b"\n").decode("utf-8", "replace")
    raise ForeignFileError(f"its columns are {printable(found[:200])!r}, not {rows.header.decode().rstrip()!r}")


def _is_torn(rows: Rows, record: bytes, *, first: bool) -> bool:
    """Whether a damaged last record is a torn one. If it is the only one, it must also begin as rows of capcli do."""
    ours = not first or record.startswith(rows.first_bytes) or rows.first_bytes.startswith(record)
    return ours and rows.may_be_torn(record)


def _size_without_nuls(stream: BinaryIO) -> int:
    size = stream.seek(0, os.SEEK_END)
    while size:
        start = max(0, size - _BLOCK)
        stream.seek(start)
        size = start + len(stream.read(size - start).rstrip(b"\0"))
        if size > start:
            break
    stream.seek(0)
    return size
