"""Advisory locks on open files and folders: one run at a time writes captions, prepared copies, engines and trained models."""

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


class FolderLock:
    """Locks on folders, held until `release` or the end of the process.

    A process that is forked meanwhile closes its copies: it may outlive this one, and would hold the locks for as long.
    """

    def __init__(self) -> None:
        self._descriptors: list[int] = []
        os.register_at_fork(after_in_child=self.release)

    def take(self, folder: str) -> bool:
        """Lock a folder; False where another process has locked it. Raises OSError where it cannot be opened."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        if not take(descriptor):
            os.close(descriptor)
            return False
        self._descriptors.append(descriptor)
        return True

    @property
    def held(self) -> bool:
        return bool(self._descriptors)

    def release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
