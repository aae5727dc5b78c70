"""Images in folders, by name and by pattern: listed lazily, in the byte order of their names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from capcli.records import Entry, Failure
from capcli.sources.hidden import is_hidden, omission
from capcli.sources.patterns import MAGIC, Pattern, PatternFilter
from capcli.text import printable

# Photos and pictures that Pillow opens, with its HEIF, AVIF and JPEG XL plugins.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".apng", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".pcx", ".psd", ".qoi", ".ico", ".icns", ".dds", ".sgi", ".xbm"),
)

_VISIBLE = Pattern.loose("*")
Warn = Callable[[str], None]
Test = Callable[[str], bool]
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class FolderSource:
    """The images in a folder; with `relative` their names are relative to it, else they begin with its path."""

    path: str
    wanted: PatternFilter
    recursive: bool
    relative: bool
    warn: Warn

    def __iter__(self) -> Iterator[Entry]:
        for found in walk_all(self.path, self._enters, self._takes, self.warn, special=True):
            path = os.path.join(self.path, str(found))
            name = str(found) if self.relative else path
            yield found.entry(name, path) if isinstance(found, Unlisted) else Entry(name, path)

    def searched(self) -> Iterator[str]:
        """The names of all files in the folders that are searched, except hidden ones."""
        return walk(self.path, self._enters, _VISIBLE.matches, lambda _: None)

    def _enters(self, name: str) -> bool:
        if not self.recursive or self.wanted.enters(name):
            return self.recursive
        if (line := omission(name)) is not None and not self.wanted.excludes(name):
            self.warn(f"{line}; --include '**/{name.rpartition('/')[2]}/**' lists them")
        return False

    def _takes(self, name: str) -> bool:
        hidden = is_hidden(name) and not self.wanted.include
        return not hidden and self.wanted.takes(name)


@dataclass(frozen=True, slots=True)
class GlobSource:
    """The files that match a pattern. A folder that matches is not searched."""

    folder: str  # the part of the pattern before the first wildcard; "" for the working folder
    pattern: Pattern
    wanted: PatternFilter
    warn: Warn

    @classmethod
    def of(cls, text: str, wanted: PatternFilter, warn: Warn) -> GlobSource:
        parts = text.split("/")
        fixed = next(index for index, part in enumerate(parts) if MAGIC.search(part))
        folder = "/".join(parts[:fixed])
        if fixed and not folder:
            folder = "/"
        return cls(folder, Pattern.anchored("/".join(parts[fixed:])), wanted, warn)

    def __iter__(self) -> Iterator[Entry]:
        for found in walk_all(self.folder or os.curdir, self._enters, self._takes, self.warn, special=True):
            path = os.path.join(self.folder, str(found))
            yield found.entry(path, path) if isinstance(found, Unlisted) else Entry(path, path)

    def searched(self) -> Iterator[str]:
        """The names of all files that match the pattern."""
        return walk(self.folder or os.curdir, self._enters, self.pattern.matches, lambda _: None)

    def _enters(self, name: str) -> bool:
        return self.pattern.may_match_below(name) and not any(pattern.matches(name) for pattern in self.wanted.exclude)

    def _takes(self, name: str) -> bool:
        return self.pattern.matches(name) and self.wanted.takes(name)


@dataclass(frozen=True, slots=True)
class Unlisted:
    """A folder that cannot be listed: its name, which ends with `/`, and the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return self.name

    def entry(self, name: str, path: str) -> Entry:
        """An entry that has failed: nothing is known of the images in the folder."""
        return Entry(name, path, failure=Failure(name, "unlisted", f"the folder cannot be listed: {self.reason}"))


def walk(root: str, enters: Test, takes: Test, warn: Warn) -> Iterator[str]:
    """The names of `walk_all`; `warn` is called for a folder that cannot be listed."""
    for found in walk_all(root, enters, takes, warn):
        if isinstance(found, Unlisted):
            warn(f"{printable(os.path.join(root, found.name))}: {found.reason}, folder skipped")
        else:
            yield found


def walk_all(root: str, enters: Test, takes: Test, warn: Warn, *, special: bool = False) -> Iterator[str | Unlisted]:
    """Names of the files below `root` with `/` between their parts, in byte order of the whole names.

    Links are followed, except into a folder that contains them, for which `warn` is called. Of the files that are not regular
    only broken links are listed, unless `special`: opening a pipe, socket or device could block forever. A folder that cannot
    be listed is yielded as `Unlisted` in its place. Memory: the wanted names of the folders on the current path.
    """
    levels: list[_Level] = []
    folder: str | None = ""
    while True:
        if folder is not None:
            try:
                levels.append(_list(root, folder, {level.identity for level in levels}, enters, takes, special))
            except _CircularLinkError as error:
                warn(str(error))
            except OSError as error:
                yield Unlisted(folder or "./", error.strerror or str(error))
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
    """One folder of the current path: its name followed by `/`, and the names that are still to come."""

    prefix: str
    identity: Identity
    names: Iterator[str]


class _CircularLinkError(Exception):
    """A link to a folder that contains it, whose images are listed anyway."""


def _list(root: str, prefix: str, above: set[Identity], enters: Test, takes: Test, special: bool) -> _Level:
    """The wanted names of one folder, sorted, those of folders followed by `/`. Raises OSError and _CircularLinkError.

    The `/` is part of what is sorted: that gives the walk the order of the whole names.
    """
    path = os.path.join(root, prefix[:-1]) if prefix else root
    names = []
    status = os.stat(path)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise _CircularLinkError(f"{printable(path)}: a link to a folder that contains it, not followed")
    with os.scandir(path) as found:
        for entry in found:
            name = prefix + entry.name
            wanted = takes(name)
            if _is_folder(entry, unknown=not wanted):
                if enters(name):
                    names.append(entry.name + "/")
            elif wanted and (special or _is_file(entry)):
                names.append(entry.name)
    names.sort(key=os.fsencode)
    return _Level(prefix, identity, iter(names))


def _is_folder(entry: os.DirEntry[str], *, unknown: bool) -> bool:
    """Whether it is a folder; `unknown` for a link through a folder that may not be searched."""
    try:
        return entry.is_dir()
    except OSError as error:
        return unknown and error.errno != errno.ELOOP  # a link to itself is none


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether to list it: a regular file, or a broken link, which becomes a failure on record."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:
        return True


def is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
