"""Files and folders that are left out unless they are named: hidden ones, and those that other programs make."""

from __future__ import annotations

import re

# Archives made on macOS, thumbnails and deleted files of a NAS (Synology, QNAP) and of Windows, ext4's recovered files.
_OTHER_PROGRAMS = (
    "__MACOSX",
    "@eaDir",
    "@__thumb",
    "@Recycle",
    "@Recently-Snapshot",
    "#recycle",
    "#snapshot",
    "$RECYCLE.BIN",
    "RECYCLER",
    "System Volume Information",
    "lost+found",
)
# At the beginning of the last part of a name.
HIDDEN_PATTERN = rf"(?:\.|(?i:{'|'.join(map(re.escape, _OTHER_PROGRAMS))})\Z)"
_HIDDEN = re.compile(HIDDEN_PATTERN)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out: its name begins with a dot, or it is a folder that another program made."""
    return _HIDDEN.match(name.rpartition("/")[2]) is not None


def omission(folder: str) -> str | None:
    """The note that folders of this name are left out, where another program made it; None for any other folder.

    Folders whose names begin with a dot are left out without a note, as a shell does.
    """
    name = folder.rpartition("/")[2]
    if name.startswith(".") or not is_hidden(name):
        return None
    return f"folders named {name} are left out: they hold thumbnails, deleted files or metadata of other programs"
