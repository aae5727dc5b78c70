"""Captions in a text file beside each image, or in a tree of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from capcli.errors import CapcliError
from capcli.options import Existing, Suffix
from capcli.records import Entry
from capcli.sinks.keys import Keys, key
from capcli.storage import atomic
from capcli.text import printable, raw_bytes


class Sidecars:
    """One file per image, a caption a line. Two images of one stem share a sidecar: the first listed has it."""

    def __init__(self, suffix: Suffix, folder: str | None, existing: Existing, warn: Callable[[str], None]) -> None:
        self._suffix = suffix
        self._folder = folder
        self.existing = existing
        self._warn = warn
        self._claimed = Keys()
        self._others: set[int] = set()

    def path(self, entry: Entry) -> str:
        """Where the captions of this image go; inside the folder given, whatever its name."""
        image = entry.path if self._folder is None else os.path.join(self._folder, _inside(entry.name))
        stem, suffix = os.path.splitext(image)
        return (image if suffix.lower() == self._suffix else stem) + self._suffix

    def claim(self, entry: Entry) -> bool:
        """Whether this image is to get its sidecar written; to be asked once for every image listed, in order."""
        path = self.path(entry)
        target = key(raw_bytes(os.path.normpath(path)))
        if target in self._claimed:
            self._others.add(key(raw_bytes(entry.name)))
            self._warn(f"{printable(entry.name)}: its sidecar {printable(path)} is another image's, left as it is")
            return False
        self._claimed.add(target)
        return self.existing != "skip" or not os.path.lexists(path)

    def write(self, entry: Entry, texts: Sequence[str]) -> None:
        """Write the sidecar, whole or not at all; raises CapcliError. Writing the same again changes nothing."""
        if key(raw_bytes(entry.name)) in self._others:
            return
        path = self.path(entry)
        lines = [" ".join(text.splitlines()) for text in texts]
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        try:
            if self._folder is not None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            if self.existing == "append":
                data = _appended(path, data)
            # Another run may be at work in the same folder.
            mark = f".capcli-{os.getpid()}-{threading.get_ident()}.tmp"
            atomic.replace(path, [data], os.path.join(os.path.dirname(path), mark))
        except OSError as error:
            raise CapcliError(f"cannot write the sidecar {printable(path)}: {error.strerror or error}") from error


def _appended(path: str, data: bytes) -> bytes:
    """What is there with `data` behind, unless it ends in that already."""
    try:
        with open(path, "rb") as stream:
            before = stream.read()
    except FileNotFoundError:
        return data
    if before and not before.endswith(b"\n"):
        before += b"\n"
    return before if (b"\n" + before).endswith(b"\n" + data) else before + data


def _inside(name: str) -> str:
    """The name as one below a folder: neither absolute nor leading out of it."""
    return os.path.normpath(os.sep + os.path.splitdrive(name)[1]).lstrip(os.sep)
