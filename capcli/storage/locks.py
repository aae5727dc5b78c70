"""Advisory locks on open files and folders: one run at a time writes captions, prepared copies and engines."""

from __future__ import annotations

import errno
import fcntl
import os


def take(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False where another process has locked it.

    On a network file system without locks this returns True: a second run is not prevented there.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def is_free(descriptor: int) -> bool:
    """Lock an open file or folder until it is closed; False also where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_current(descriptor: int, path: str) -> bool:
    """Whether `path` still refers to the open file: another run may have replaced it before this one locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False
