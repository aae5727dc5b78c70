"""Images in folders, by name and by pattern: listed lazily, in the byte order of their names."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from capcli.records import Entry
from capcli.sources.patterns import MAGIC, Pattern, PatternFilter
from capcli.text import printable

# What Pillow (with its HEIF, AVIF and JPEG XL plugins) opens and people call a photo or a picture.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".psd", ".qoi", ".ico", ".icns", ".dds", ".sgi", ".xbm"),
)

Warn = Callable[[str], None]
Test = Callable[[str], bool]
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder as a source. `bare`: its entries are named relative to it, not with its own path in front."""

    path: str
    sieve: PatternFilter
    recursive: bool
    bare: bool
    warn: Warn

    def __iter__(self) -> Iterator[Entry]:
        for name in walk(self.path, self._enters, self._takes, self.warn):
            path = os.path.join(self.path, name)
            yield Entry(name if self.bare else slashed(path), path)

    def _enters(self, name: str) -> bool:
        return self.recursive and self.sieve.enters(name)

    def _takes(self, name: str) -> bool:
        hidden = name.rpartition("/")[2].startswith(".") and not self.sieve.include
        return not hidden and self.sieve.takes(name)


@dataclass(frozen=True, slots=True)
class GlobSource:
    """A pattern as a source: the files that match it, never what lies in folders that match it."""

    folder: str  # the part of the pattern before the first wildcard; "" for the working folder
    pattern: Pattern
    sieve: PatternFilter
    warn: Warn

    @classmethod
    def of(cls, text: str, sieve: PatternFilter, warn: Warn) -> GlobSource:
        parts = slashed(text).split("/")
        fixed = next(index for index, part in enumerate(parts) if MAGIC.search(part))
        folder = "/".join(parts[:fixed])
        if fixed and not folder:
            folder = "/"
        return cls(folder, Pattern.anchored("/".join(parts[fixed:])), sieve, warn)

    def __iter__(self) -> Iterator[Entry]:
        for name in walk(self.folder or os.curdir, self._enters, self._takes, self.warn):
            path = os.path.join(self.folder, name)
            yield Entry(slashed(path), path)

    def _enters(self, name: str) -> bool:
        return self.pattern.may_hold(name) and not any(pattern.matches(name) for pattern in self.sieve.exclude)

    def _takes(self, name: str) -> bool:
        return self.pattern.matches(name) and self.sieve.takes(name)


def walk(root: str, enters: Test, takes: Test, warn: Warn) -> Iterator[str]:
    """Names of the files below `root` with `/` between their parts, in byte order of the whole names.

    Links are followed, but not back into a folder that the walk is in. Files that are neither regular nor broken links
    (pipes, sockets, devices) are left out: opening one could block for ever. A folder that cannot be listed is warned
    of and passed over. Held at any time: the wanted names of the folders on the current path.
    """
    levels: list[_Level] = []
    folder: str | None = ""
    while True:
        if folder is not None:
            try:
                levels.append(_list(root, folder, {level.identity for level in levels}, enters, takes))
            except _NotListedError as error:
                warn(str(error))
        if not levels:
            return
        folder, name = None, next(levels[-1].names, None)
        if name is None:
            levels.pop()
        elif name.endswith("/"):
            folder = levels[-1].prefix + name
        else:
            yield levels[-1].prefix + name


@dataclass(frozen=True, slots=True)
class _Level:
    """One folder of the current path: its name with `/` behind, and what is left of its names."""

    prefix: str
    identity: Identity
    names: Iterator[str]


class _NotListedError(Exception):
    """A folder that is passed over, and why."""


def _list(root: str, prefix: str, above: set[Identity], enters: Test, takes: Test) -> _Level:
    """The wanted names of one folder, sorted, folders with a `/` behind; raises _NotListedError.

    The `/` takes part in the sorting, which makes the order of the walk that of the whole names.
    """
    path = os.path.join(root, prefix[:-1]) if prefix else root
    names = []
    try:
        status = os.stat(path)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise _NotListedError(f"{printable(path)}: a link back to a folder around it, not followed")
        with os.scandir(path) as found:
            for entry in found:
                name = prefix + entry.name
                if _is_folder(entry):
                    if enters(name):
                        names.append(entry.name + "/")
                elif takes(name) and _is_file(entry):
                    names.append(entry.name)
    except OSError as error:
        raise _NotListedError(f"{printable(path)}: {error.strerror or error}, folder passed over") from None
    names.sort(key=os.fsencode)
    return _Level(prefix, identity, iter(names))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be searched
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether to list it: a regular file, or a link that leads nowhere, which is better failed than forgotten."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def slashed(path: str) -> str:
    """The path with `/` between its parts, whatever the system's own separator."""
    return path if os.sep == "/" else path.replace(os.sep, "/")


def is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
