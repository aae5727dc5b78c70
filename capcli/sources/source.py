"""The images that a command's arguments name, as one source: folders, files, glob patterns, a list, standard input."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

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
    images are rows of a prepared copy, which have no path.
    """

    parts: tuple[Iterable[Entry], ...]
    given: tuple[str, ...]
    root: str | None
    streaming: bool
    stored: bool

    def __iter__(self) -> Iterator[Entry]:
        for part in self.parts:
            yield from part

    def describe(self) -> str:
        """The source as one line of text, for the run file."""
        return ", ".join(self.given)


@dataclass(frozen=True)
class Naming:
    """How an earlier run named its images: relative to the folder `root` (a real path), or as given where that is None."""

    root: str | None

    def relative_to(self, folder: str) -> bool:
        """Whether the images of this folder are named relative to it."""
        return self.root is not None and os.path.realpath(folder) == self.root


def open_source(options: SourceOptions, warn: Callable[[str], None], earlier: Naming | None = None) -> Source:
    """The images that `options` name; `warn` is called, once, for each folder that cannot be listed.

    Names are relative to a folder that is the only source. A run that resumes an `earlier` one names images as that run
    did, so that adding or removing a source changes no name.

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
        parts=tuple(parts),
        given=tuple(given),
        root=next((os.path.realpath(part.path) for part in relative), None),
        streaming=any(isinstance(part, ListStream) for part in parts),
        stored=any(isinstance(part, PreparedSource) for part in parts),
    )


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
    if next(iter(GlobSource(glob.folder, glob.pattern, glob.wanted, lambda _: None)), None) is None:
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
