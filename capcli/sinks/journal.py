"""An append-only file of records that outlives a kill: locked, read once, mended, then appended to record by record."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from capcli.errors import CapcliError, UsageError
from capcli.sinks import scan
from capcli.sinks.formats import Rows
from capcli.sinks.keys import key
from capcli.storage import atomic, locks
from capcli.text import printable

_SYNC_SECONDS = 5.0
_BLOCK = 1 << 18


class Journal:
    """One file of records. The order of calls is open, keys, begin, append or replace, close.

    Nothing on disk changes before `begin`. `option` is the option that named the file, for messages. Every method
    raises CapcliError where the file cannot be read or written, with what is on disk whole.
    """

    def __init__(self, path: str, option: str) -> None:
        self.path = path
        self._shown = printable(path)
        self._option = option
        self._real = os.path.realpath(path)  # a link to the file stays a link when the file is replaced
        self._descriptor: int | None = None
        self._end = 0  # bytes of whole records
        self._last = 0  # where the last of them begins
        self._unsynced = False
        self._synced = time.monotonic()

    @property
    def empty(self) -> bool:
        return self._end == 0

    @property
    def exists(self) -> bool:
        return self._descriptor is not None

    def open(self) -> None:
        """Lock the file if it exists; UsageError where it cannot be this command's output."""
        if not os.path.basename(self.path) or os.path.isdir(self._real):
            raise UsageError(f"{self._option} {self._shown} is a folder: name a file in it")
        if not os.path.exists(self._real):
            self._check_folder()
            return
        if not os.path.isfile(self._real):
            raise UsageError(f"{self._option} {self._shown} is no regular file; rows go to standard output with -")
        try:
            self._descriptor = os.open(self._real, os.O_RDWR | atomic.BINARY)
        except OSError as error:
            raise UsageError(f"{self._option} {self._shown} cannot be written: {error.strerror}") from None
        self._lock(self._descriptor)
        self._end = os.fstat(self._descriptor).st_size
        if not locks.still_there(self._descriptor, self._real):
            raise self._in_use()

    def starts_with(self, head: bytes) -> bool:
        if self._descriptor is None:
            return False
        with self._reader() as stream:
            return stream.read(len(head)) == head

    def keys(self, rows: Rows) -> Iterator[int]:
        """The keys of all names on record, in order; finds where a torn tail begins.

        Raises UsageError for a file of someone else, CapcliError for damage that is no torn tail.
        """
        if self._descriptor is None:
            return
        self._end = self._last = 0
        try:
            with self._faults("read"), self._reader() as stream:
                for record in scan.whole_records(stream, rows):
                    self._last, self._end = record.begin, record.end
                    if record.name is not None:
                        yield key(record.name)
        except scan.ForeignFileError as error:
            raise UsageError(
                f"{self._shown} holds other rows than this command would write: {error}; {self._ways_out()}"
            ) from None
        except scan.DamageError as error:
            raise CapcliError(f"{self._shown}, {error}. Mend or delete that line, or {self._ways_out()}") from None

    def records(self, rows: Rows) -> Iterator[bytes]:
        """The whole records, raw."""
        with self._reader() as stream:
            stream.seek(len(rows.header))
            yield from rows.records(scan.lines(stream, self._end - len(rows.header)))

    def last_record(self) -> bytes:
        """The last whole record, raw; empty where there is none."""
        if self._last == self._end or self._descriptor is None:
            return b""
        with self._reader() as stream:
            stream.seek(self._last)
            return stream.read(self._end - self._last)

    def begin(self, *, anew: bool = False) -> int:
        """Create the file, or cut off its torn tail (`anew`: everything). Returns how many bytes were cut off."""
        if self._descriptor is None:
            self._create()
            return 0
        self._end = 0 if anew else self._end
        with self._faults():
            torn = os.fstat(self._descriptor).st_size - self._end
            if torn:
                os.ftruncate(self._descriptor, self._end)
                os.fsync(self._descriptor)
        return torn

    def append(self, record: bytes) -> None:
        """Write one record in one call; a write that falls short is taken back."""
        if self._descriptor is None:
            self._create()
        with self._faults():
            try:
                os.lseek(self._fd, self._end, os.SEEK_SET)
                left = memoryview(record)
                while left:  # the second turn of a write that fell short tells why
                    left = left[os.write(self._fd, left) :]
            except OSError:
                with contextlib.suppress(OSError):  # if this fails too, the next run cuts it off
                    os.ftruncate(self._fd, self._end)
                raise
            self._end += len(record)
            self._unsynced = True
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def replace(self, chunks: Iterable[bytes]) -> None:
        """Put these bytes in place of the whole file at once; the lock holds throughout."""
        temporary = f"{self._real}.tmp"
        with self._faults():
            fresh = atomic.write(temporary, chunks, os.O_RDWR, self._take_over)
            if not locks.REPLACES_OPEN_FILES:
                os.close(fresh)
                os.close(self._fd)
                atomic.settle(temporary, self._real)
                fresh = os.open(self._real, os.O_RDWR | atomic.BINARY)
            else:
                atomic.settle(temporary, self._real)
                os.close(self._fd)
            self._descriptor = fresh
            self._end = os.fstat(fresh).st_size

    def remove(self) -> None:
        """Delete the file; the next record creates it."""
        if self._descriptor is None:
            return
        with self._faults():
            if not locks.REPLACES_OPEN_FILES:
                os.close(self._descriptor)
                os.unlink(self._real)
            else:
                os.unlink(self._real)
                os.close(self._descriptor)
        self._descriptor, self._end, self._last, self._unsynced = None, 0, 0, False
        atomic.sync_folder(os.path.dirname(self._real))

    def close(self) -> None:
        """Make all records safe on disk and let go of the file."""
        if self._descriptor is None:
            return
        try:
            with self._faults():
                self._sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _fd(self) -> int:
        if self._descriptor is None:
            raise ValueError("the journal is not open")
        return self._descriptor

    def _check_folder(self) -> None:
        """Whether the file could be created, as far as that shows without trying."""
        folder = os.path.dirname(self._real)
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise UsageError(f"{self._option} {self._shown}: {printable(folder)} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UsageError(f"{self._option} {self._shown}: no permission to write in {printable(folder)}")

    def _create(self) -> None:
        folder = os.path.dirname(self._real)
        with self._faults():
            os.makedirs(folder, exist_ok=True)
            try:
                self._descriptor = os.open(self._real, os.O_RDWR | os.O_CREAT | os.O_EXCL | atomic.BINARY, 0o666)
            except FileExistsError:  # it was not there when this run looked
                raise self._in_use() from None
        self._lock(self._descriptor)
        atomic.sync_folder(folder)

    def _lock(self, descriptor: int) -> None:
        if not locks.take(descriptor):
            raise self._in_use()

    def _take_over(self, fresh: int) -> None:
        """Give the file that will replace this one its lock and its permissions."""
        self._lock(fresh)
        if hasattr(os, "fchmod"):
            os.fchmod(fresh, os.fstat(self._fd).st_mode & 0o7777)

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
        return f"choose another {self._option}; --overwrite starts anew"

    def _in_use(self) -> CapcliError:
        return CapcliError(
            f"{self._shown} is being written by another run: wait for its end, or choose another {self._option}"
        )

    @contextlib.contextmanager
    def _faults(self, doing: str = "write") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise CapcliError(
                f"cannot {doing} {self._shown}: {reason}. What is there is whole; the same command goes on from there"
            ) from error
