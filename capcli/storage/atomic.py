"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable

BINARY = getattr(os, "O_BINARY", 0)


def replace(path: str, chunks: Iterable[bytes], temporary: str | None = None) -> None:
    """Write the file anew: on disk under a temporary name first, then in place of the old one. Raises OSError.

    The temporary name is one the next write uses again, so that a kill leaves one file at most; give another where two
    runs may write at once.
    """
    temporary = temporary or f"{path}.tmp"
    descriptor = write(temporary, chunks, os.O_WRONLY)
    os.close(descriptor)
    settle(temporary, path)


def write(path: str, chunks: Iterable[bytes], access: int, before: Callable[[int], None] = lambda _: None) -> int:
    """A new file with these bytes, safe on disk, and its open descriptor; nothing is left of it on OSError."""
    descriptor = os.open(path, access | os.O_CREAT | os.O_TRUNC | BINARY, 0o666)
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
    """Put the temporary file in place of `path`, on disk as well."""
    os.replace(temporary, path)
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Make new names in the folder safe on disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder or os.curdir, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
