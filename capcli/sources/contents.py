"""What is in a folder that has no images, for the message that says so."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from capcli.errors import UsageError
from capcli.options import SourceOptions
from capcli.records import Entry
from capcli.sources.files import IMAGE_SUFFIXES, FolderSource, GlobSource, Warn
from capcli.sources.prepared import PreparedSource
from capcli.text import counted, printable

SHOWN = 5  # suffixes
LONGEST_SUFFIX = 12  # characters; what follows the last dot of a longer one is no suffix


def refuse_empty(parts: Sequence[Iterable[Entry]], options: SourceOptions, warn: Warn) -> None:
    """Raises UsageError where no part of a source has an image; `warn` is called for each empty one among others.

    Lists are not read: an empty one is no error.
    """
    empty = [
        part for part in parts if isinstance(part, FolderSource | PreparedSource) and next(iter(part), None) is None
    ]
    messages = [_without_images(part, options) for part in empty]
    if len(empty) == len(parts):
        raise UsageError("; ".join(messages))
    for message in messages:
        warn(message)


def _without_images(part: FolderSource | PreparedSource, options: SourceOptions) -> str:
    if isinstance(part, PreparedSource):
        return f"{printable(part.path)}: 0 images in this prepared copy"
    deep = "" if options.recursive else "; its subfolders are not searched (--no-recursive)"
    return f"{printable(part.path)}: {described(part, options)}{deep}"


def described(part: FolderSource | GlobSource, options: SourceOptions) -> str:
    """What there is instead of images: `0 images; 214 .CR2, 12 without suffix: name them with --include`."""
    suffixes = Counter(map(_suffix, part.searched()))
    if not suffixes:
        return "0 images, and no other file"
    if options.include:
        patterns = " ".join(f"--include {printable(pattern)}" for pattern in options.include)
        return f"{patterns} takes none of {counted(suffixes.total(), 'file')}: {_listed(suffixes)}"
    images = sum(suffixes.pop(suffix) for suffix in list(suffixes) if suffix.lower() in IMAGE_SUFFIXES)
    excluded = f"; --exclude leaves out {counted(images, 'image')}" if images else ""
    others = f"; {_listed(suffixes)}: name them with --include" if suffixes else ""
    return f"0 images{excluded}{others}"


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1]
    return suffix if 1 < len(suffix) <= LONGEST_SUFFIX else ""


def _listed(suffixes: Counter[str]) -> str:
    parts = [f"{count:,} {printable(suffix) or 'without suffix'}" for suffix, count in suffixes.most_common(SHOWN)]
    rest = sum(count for _, count in suffixes.most_common()[SHOWN:])
    return ", ".join([*parts, *([f"{rest:,} others"] if rest else [])])
