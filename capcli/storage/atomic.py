"""Atomic writes: a file has its old content or all of its new content, whenever the process is killed.

A temporary file has a new name in the folder of its target, is created exclusively, never through a link, and is locked until
it has its final name. So `remove_abandoned` can tell the files of killed runs from those that are being written.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable
from typing import BinaryIO

from capcli.storage import locks

_TEMPORARY = re.compile(r"\.capcli-[0-9a-f]+(-[0-9]+)?\.tmp")  # with a second number: those of earlier versions


def replace(path: str, chunks: Iterable[bytes]) -> None:
    """Replace the file: its content is written and synced under a temporary name, then renamed. Raises OSError.

    A link at `path` is replaced, not followed.
    """
    temporary, descriptor = write(path, chunks)
    try:
        settle(temporary, path)
    finally:
        os.close(descriptor)


def copy(source: str, path: str) -> None:
    """Replace the file `path` by a copy of the content of `source`. Raises OSError."""

    def fill(file: BinaryIO) -> None:
        with open(source, "rb") as original:
            shutil.copyfileobj(original, file)

    temporary, descriptor = create(path, fill)
    try:
        settle(temporary, path)
    finally:
        os.close(descriptor)


def write(path: str, chunks: Iterable[bytes], before: Callable[[int], None] = lambda _: None) -> tuple[str, int]:
    """Write a temporary file beside `path` and sync it. Returns its path and its open descriptor, which has the lock.

    `before` is called with the descriptor before the first byte is written. Raises OSError and then leaves no file.
    """

    def fill(file: BinaryIO) -> None:
        before(file.fileno())
        file.writelines(chunks)

    return create(path, fill)


def create(path: str, fill: Callable[[BinaryIO], None]) -> tuple[str, int]:
    """As `write`, with the content that `fill` writes to the open file."""
    temporary, descriptor = _open_new(os.path.dirname(path))
    try:
        with open(descriptor, "wb", closefd=False) as file:
            fill(file)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return temporary, descriptor


def _open_new(folder: str) -> tuple[str, int]:
    """A new temporary file, locked. The loop ends: a run that sweeps the folder between two calls must hit each time."""
    while True:
        path = os.path.join(folder, f".capcli-{secrets.token_hex(8)}.tmp")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        locks.take(descriptor)
        if locks.is_current(descriptor, path):
            return path, descriptor
        os.close(descriptor)


def settle(temporary: str, path: str) -> None:
    """Rename the temporary file to `path` and sync the folder. Raises OSError and then removes the temporary file."""
    try:
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(os.path.dirname(path))


def open_no_link(path: str, flags: int) -> int:
    """An opener for `open` that refuses a link at `path`. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is a temporary file of capcli."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_abandoned(folder: str) -> None:
    """Remove the temporary files that killed runs left in the folder: regular files that no process has locked."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder or os.curdir):
            if is_temporary(name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(os.path.join(folder, name))


def _remove_unlocked(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and locks.is_free(descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def sync_folder(folder: str) -> None:
    """Sync the names in a folder to disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or os.curdir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
