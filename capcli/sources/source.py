"""The images that a command's arguments name, as one source: folders, files, glob patterns, a list, standard input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from capcli.errors import UsageError
from capcli.options import SourceOptions
from capcli.records import Entry
from capcli.sources.contents import described, refuse_empty
from capcli.sources.files import IMAGE_SUFFIXES, FolderSource, GlobSource, Warn, is_folder
from capcli.sources.lists import ListStream, open_list
from capcli.sources.patterns import MAGIC, PatternFilter
from capcli.sources.prepared import PreparedSource, is_prepared
from capcli.text import printable


@dataclass(frozen=True)
class Source:
    """The images of a run, in a fixed order: sources as given, then the list; folders in byte order of their names.

    `root` is the folder (a real path) that names are relative to, or None where names are paths as given. A `streaming`
    source reads standard input or a pipe: it can be iterated once, and must not be read in advance. With `stored` some
    images are rows of a prepared copy, which have no path. `folders` are those that are searched, also for a glob pattern.
    """

    parts: tuple[Iterable[Entry], ...]
    given: tuple[str, ...]
    root: str | None
    streaming: bool
    stored: bool
    folders: tuple[str, ...]

    def __iter__(self) -> Iterator[Entry]:
        for part in self.parts:
            yield from part

    def is_gone(self, name: str) -> bool:
        """Whether the image of this name was in one of the `folders` and no longer exists."""
        path = os.path.abspath(os.path.join(self.root or "", name))
        inside = (
            os.path.join(each, "") for folder in self.folders for each in (os.path.abspath(folder), _real(folder))
        )
        if not any(map(path.startswith, inside)):
            return False
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # it cannot be known
            return False
        return False

    def describe(self) -> str:
        """The source as one line of text, for the run file."""
        return ", ".join(self.given)


@dataclass(frozen=True)
class Naming:
    """How an earlier run named its images: relative to the folder `root` (a real path), or as given where that is None.

    With `all_relative` the images outside the folder are named relative to it as well, such as `../more/a.jpg`. Earlier
    versions named those as given.
    """

    root: str | None
    all_relative: bool = False

    def relative_to(self, folder: str) -> bool:
        """Whether the images of this folder are named relative to it."""
        return self.root is not None and os.path.realpath(folder) == self.root

    def applied(self, part: Iterable[Entry]) -> Iterable[Entry]:
        """The entries of a part of a source, with names by this rule."""
        stored = isinstance(part, PreparedSource)  # its entries have no path
        if self.root is None or not self.all_relative or stored or (isinstance(part, FolderSource) and part.relative):
            return part
        return _Renamed(part, self.root)


@dataclass(frozen=True, slots=True)
class _Renamed:
    """Entries whose names are relative to the folder `root`, a real path."""

    part: Iterable[Entry]
    root: str

    def __iter__(self) -> Iterator[Entry]:
        given, prefix = None, ""
        for entry in self.part:
            folder, name = os.path.split(entry.path.removesuffix("/"))
            if folder != given:
                given, prefix = folder, _relative(folder, self.root)
            renamed = os.path.normpath(os.path.join(prefix, name)) + ("/" if entry.path.endswith("/") else "")
            failure = None if entry.failure is None else replace(entry.failure, name=renamed)
            yield replace(entry, name=renamed, failure=failure)


def open_source(options: SourceOptions, warn: Callable[[str], None], earlier: Naming | None = None) -> Source:
    """The images that `options` name; `warn` is called, once, for each link to a folder that contains it.

    Names are relative to a folder that is the only source. A run that resumes an `earlier` one names images by the rule of that
    run, so that adding or removing a source changes no name. A folder that cannot be listed is an entry with a failure.

    Raises UsageError for no source, one that does not exist or cannot be read, folders and patterns without images, and
    options without effect. The paths in a list are not checked.
    """
    lists = [source for source in options.sources if source == "-"]
    lists += [] if options.from_file is None else [options.from_file]
    _check(options, lists)
    warn_once = _once(warn)
    alone = len(options.sources) == 1 and options.from_file is None
    wanted = PatternFilter.of(options.include, options.exclude, IMAGE_SUFFIXES)
    parts = [
        _open(source, options, wanted, warn_once, relative=earlier.relative_to(source) if earlier else alone)
        for source in options.sources
    ]
    if options.from_file is not None:
        parts.append(open_list(options.from_file, null=options.null))
    if (options.include or options.exclude) and not any(isinstance(part, FolderSource | GlobSource) for part in parts):
        raise UsageError("--include and --exclude filter folders and glob patterns: no SOURCE is one")
    refuse_empty(parts, options, warn_once)
    given = [_described(source) for source in options.sources]
    given += [] if options.from_file is None else [_described(options.from_file, "list ")]
    relative = (part for part in parts if isinstance(part, FolderSource) and part.relative)
    return Source(
        parts=tuple(parts) if earlier is None else tuple(map(earlier.applied, parts)),
        given=tuple(given),
        root=earlier.root if earlier else next((os.path.realpath(part.path) for part in relative), None),
        streaming=any(isinstance(part, ListStream) for part in parts),
        stored=any(isinstance(part, PreparedSource) for part in parts),
        folders=tuple(_searched(parts)),
    )


def _searched(parts: Iterable[Iterable[Entry]]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, FolderSource):
            yield part.path
        elif isinstance(part, GlobSource):
            yield part.folder or os.curdir


def _relative(folder: str, root: str) -> str:
    """The folder as a path relative to `root`, a real path: through the links below it that lead to the folder, if any."""
    above = path = os.path.abspath(folder)
    while os.path.realpath(above) != root:
        parent = os.path.dirname(above)
        if parent == above:
            return os.path.relpath(os.path.realpath(path), root)
        above = parent
    return os.path.relpath(path, above)


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _check(options: SourceOptions, lists: list[str]) -> None:
    if not options.sources and options.from_file is None:
        raise UsageError("no source: name a file, a folder, a glob pattern, or - for names on standard input")
    if lists.count("-") > 1:
        raise UsageError("standard input can be read once only: - is given twice")
    if options.null and not lists:
        raise UsageError("--null sets the separator of a list: there is no list")


def _open(source: str, options: SourceOptions, wanted: PatternFilter, warn: Warn, *, relative: bool) -> Iterable[Entry]:
    if source == "-":
        return open_list("-", null=options.null)
    if is_folder(source):
        try:
            os.scandir(source).close()
        except OSError as error:
            raise UsageError(f"{printable(source)}: {error.strerror or error}") from None
        if is_prepared(source):
            return PreparedSource.of(source)
        return FolderSource(source, wanted, options.recursive, relative, warn)
    if os.path.lexists(source):
        return (Entry(source, source),)
    if not MAGIC.search(source):
        raise UsageError(f"{printable(source)}: no such file or folder")
    glob = GlobSource.of(source, wanted, warn)
    # Walked up to its first match: there is no other way to find out that nothing matches.
    found = GlobSource(glob.folder, glob.pattern, glob.wanted, lambda _: None)
    if not any(entry.failure is None or os.path.lexists(entry.path) for entry in found):
        kind = "file" if options.include else "file with an image suffix"
        raise UsageError(f"{printable(source)}: no {kind} matches: {described(glob, options)}")
    return glob


def _once(warn: Warn) -> Warn:
    """`warn` without repetitions: a folder may be walked twice, the second time to count its images."""
    warned: set[str] = set()

    def warn_once(line: str) -> None:
        if line not in warned:
            warned.add(line)
            warn(line)

    return warn_once


def _described(source: str, kind: str = "") -> str:
    return "standard input" if source == "-" else f"{kind}{printable(source)}"
