"""One run at a time on a file."""

from __future__ import annotations

import errno
import os

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second run out
    fcntl = None  # type: ignore[assignment]

REPLACES_OPEN_FILES = os.name != "nt"


def take(descriptor: int) -> bool:
    """Lock the open file until it is closed; False where another run has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # any other: a network file system that has no locks
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def still_there(descriptor: int, path: str) -> bool:
    """Whether the path leads to the open file: a run that has just ended may have replaced it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
