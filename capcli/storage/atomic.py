"""Atomic writes: a file has its old content or all of its new content, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable


def replace(path: str, chunks: Iterable[bytes], temporary: str | None = None) -> None:
    """Replace the content of the file. It is written and synced under a temporary name, then renamed. Raises OSError.

    The next write uses the same temporary name, so that a kill leaves at most one such file. Give another `temporary`
    where two processes may write at once.
    """
    temporary = temporary or f"{path}.tmp"
    os.close(write(temporary, chunks, os.O_WRONLY))
    settle(temporary, path)


def write(path: str, chunks: Iterable[bytes], access: int, before: Callable[[int], None] = lambda _: None) -> int:
    """Create a file with these bytes, sync it, and return its open descriptor. Raises OSError and then leaves no file.

    `access` is `os.O_WRONLY` or `os.O_RDWR`; `before` is called with the descriptor before the first byte is written.
    """
    descriptor = os.open(path, access | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        before(descriptor)
        with open(descriptor, "wb", closefd=False) as stream:
            stream.writelines(chunks)
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return descriptor


def settle(temporary: str, path: str) -> None:
    """Rename the temporary file to `path` and sync the folder. Raises OSError."""
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Sync the names in a folder to disk, where the file system supports it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or os.curdir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
