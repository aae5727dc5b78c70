"""Captions in a text file beside each image, or in a separate folder with the same structure."""

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
    """One file per image, one caption per line. Images with the same stem share a sidecar, which is written for the first one."""

    def __init__(self, suffix: Suffix, folder: str | None, existing: Existing, warn: Callable[[str], None]) -> None:
        self._suffix = suffix
        self._folder = folder
        self.existing = existing
        self._warn = warn
        self._claimed = Keys()  # sidecars
        self._without: set[int] = set()  # images whose sidecar is another image's

    def path(self, entry: Entry) -> str:
        """The sidecar of an image. With a folder given it is inside that folder, whatever the name."""
        image = entry.path if self._folder is None else os.path.join(self._folder, _inside(entry.name))
        stem, suffix = os.path.splitext(image)
        return (image if suffix.lower() == self._suffix else stem) + self._suffix

    def claim(self, entry: Entry) -> bool:
        """Whether the sidecar of this image is to be written. Call it once for each image, in the order of the source."""
        path = self.path(entry)
        target = key(raw_bytes(os.path.normpath(path)))
        if target in self._claimed:
            self._without.add(key(raw_bytes(entry.name)))
            self._warn(
                f"{printable(entry.name)}: no sidecar written, {printable(path)} belongs to an image of the same stem"
            )
            return False
        self._claimed.add(target)
        return self.existing != "skip" or not os.path.lexists(path)

    def write(self, entry: Entry, texts: Sequence[str]) -> None:
        """Write the sidecar atomically. Writing the same captions twice has no effect. Raises CapcliError."""
        if key(raw_bytes(entry.name)) in self._without:
            return
        path = self.path(entry)
        lines = [" ".join(text.splitlines()) for text in texts]
        data = "".join(f"{line}\n" for line in lines).encode("utf-8", "replace")
        try:
            if self._folder is not None:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            if self.existing == "append":
                data = _appended(path, data)
            # Another run may write to the same folder at the same time.
            temporary = f".capcli-{os.getpid()}-{threading.get_ident()}.tmp"
            atomic.replace(path, [data], os.path.join(os.path.dirname(path), temporary))
        except OSError as error:
            raise CapcliError(f"cannot write the sidecar {printable(path)}: {error.strerror or error}") from error


def _appended(path: str, data: bytes) -> bytes:
    """The content of the file followed by `data`, unless it already ends with it."""
    try:
        with open(path, "rb") as stream:
            before = stream.read()
    except FileNotFoundError:
        return data
    if before and not before.endswith(b"\n"):
        before += b"\n"
    return before if (b"\n" + before).endswith(b"\n" + data) else before + data


def _inside(name: str) -> str:
    """The name as a relative path that stays within its folder."""
    return os.path.normpath(os.sep + os.path.splitdrive(name)[1]).lstrip(os.sep)
