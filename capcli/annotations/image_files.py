"""Finds the files of images that annotations name: in the folder that was given, or in one near the annotations."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple
from urllib.parse import unquote

from capcli.annotations.name_matching import NameIndex
from capcli.annotations.rows import SPLITS, Annotations
from capcli.sources import IMAGE_SUFFIXES
from capcli.sources.hidden import is_hidden

# Only folders with such names are tried beside the annotations' own: another data set may have images of the same names.
_LIKELY = re.compile(
    r"(.*[-_ ])?(images?|imgs?|photos?|pictures?|pics|dataset|jpe?gs?)|(train|training|val|valid|validation|dev|test)(20\d\d)?",
    re.IGNORECASE,
)
_COCO_NAME = re.compile(r"COCO_((?:train|val|test)\d{4})_")
_DRIVE = re.compile(r"[A-Za-z]:(?=[\\/])")  # of a Windows name
_FILE_URL = "file://"
SAMPLE = 64  # names by which the folder is chosen


class FoundImage(NamedTuple):
    """The file of an image. `by_end`: only the end of the name leads to it, as the name is a whole path elsewhere."""

    path: str
    by_end: bool = False


class Listings:
    """The names in folders, each folder listed once: faster than a system call for each of a hundred thousand files."""

    def __init__(self) -> None:
        self._files: dict[str, frozenset[str] | None] = {}
        self._indexes: dict[str, NameIndex] = {}
        self._stems: dict[str, dict[str, str]] = {}
        self._real: dict[str, str] = {}
        self._other_folder = cache(self._search_other_folder)

    def files(self, folder: str) -> frozenset[str] | None:
        """The names in the folder, without those of folders; None where it cannot be listed."""
        if folder not in self._files:
            self._files[folder] = _listed(folder)
        return self._files[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in (self.files(folder) or ())

    def in_other_form(self, path: str) -> str | None:
        """The file whose name, and whose folders' names, differ from those of `path` in their Unicode form alone."""
        folder, name = os.path.split(path)
        if self.files(folder) is None and folder not in ("", path):
            other = self._other_folder(folder)
            return None if other in (None, folder) else self.in_other_form(os.path.join(str(other), name))
        if folder not in self._indexes:
            self._indexes[folder] = NameIndex(self.files(folder) or ())
        found = self._indexes[folder].find(name)
        return None if found is None else os.path.join(folder, found)

    def _search_other_folder(self, folder: str) -> str | None:
        """The folder whose name differs from `folder` in the Unicode form of its parts alone."""
        above, name = os.path.split(folder)
        if above == folder:
            return None
        if above and not os.path.isdir(above):
            other = self._other_folder(above)
            if other is None:
                return None
            above = other
        with contextlib.suppress(OSError, ValueError), os.scandir(above or os.curdir) as found:
            same = NameIndex(entry.name for entry in found if entry.is_dir()).find(name)
            return None if same is None else os.path.join(above, same)
        return None

    def by_stem(self, path: str) -> str | None:
        """The image whose name is that of `path` plus a suffix, or None."""
        folder, name = os.path.split(path)
        if folder not in self._stems:
            pairs = (os.path.splitext(file) for file in sorted(self.files(folder) or (), reverse=True))
            self._stems[folder] = {stem: suffix for stem, suffix in pairs if suffix.lower() in IMAGE_SUFFIXES}
        suffix = self._stems[folder].get(name)
        return None if suffix is None else path + suffix

    def identity(self, path: str) -> str:
        """The path with its folder resolved (`os.path.realpath`): the same for two spellings of one path."""
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)


def _listed(folder: str) -> frozenset[str] | None:
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or os.curdir) as found:
        return frozenset(entry.name for entry in found if not entry.is_dir())
    return None


class ImageFinder:
    """Finds the images of one annotation file.

    `choose` picks `root`: of the folders in `candidates` the one with the most names of a sample. Below it a name is
    first looked for in the folder that its row gives (Karpathy's `filepath`, COCO's `train2014`, the split's), then as it
    is.
    """

    def __init__(self, annotations: Annotations, root: str | None, listings: Listings) -> None:
        self.candidates = tuple(_candidates(annotations, root))
        self._listings = listings
        self._given = root is not None
        self.root = self.candidates[0]
        self._below = cache(self._subfolders)

    def choose(self, sample: Sequence[tuple[str, str, str | None]]) -> None:
        """Sets `root` by some images, each given as its name, its row's folder ("" if none) and its split."""
        hits = [sum(self._hit(root, *image) for image in sample) for root in self.candidates]
        self.root = self.candidates[hits.index(max(hits))]

    def _hit(self, root: str, name: str, folder: str, split: str | None) -> bool:
        """Whether the folder `root` has the image; an absolute name that exists speaks for no folder."""
        if _is_whole(name):
            return self._by_end(root, name, folder, split) is not None
        return self._find(root, name, folder, split) is not None

    def find(self, name: str, folder: str, split: str | None) -> FoundImage | None:
        """The file of the image, or None.

        A whole path of another machine is found by its end: by as many of its last parts as lead to a file, where the
        folder of the images was given.
        """
        if not _is_whole(name):
            path = self._find(self.root, name, folder, split)
            return None if path is None else FoundImage(path)
        name = name.removeprefix(_FILE_URL)
        path = self._existing(name)
        if path is not None:
            return FoundImage(path)
        return self._by_end(self.root, name, folder, split)

    def _by_end(self, root: str, name: str, folder: str, split: str | None) -> FoundImage | None:
        if not self._given:
            return None
        name = name.removeprefix(_FILE_URL)
        parts = [part for part in _DRIVE.sub("", name, count=1).replace("\\", "/").split("/") if part]
        for start in range(len(parts)):
            path = self._find(root, "/".join(parts[start:]), folder, split)
            if path is not None:
                return FoundImage(path, by_end=True)
        return None

    def _find(self, root: str, name: str, folder: str, split: str | None) -> str | None:
        found = _COCO_NAME.match(name)
        for below in self._below(root, folder, split, found[1] if found else ""):
            path = self._existing(os.path.join(below, name))
            if path is not None:
                return path
        return None

    def _subfolders(self, root: str, folder: str, split: str | None, release: str) -> tuple[str, ...]:
        split_folders = [name for name, of in SPLITS.items() if of == split]
        names = dict.fromkeys(name for name in (folder, release, *split_folders) if name)
        below = [os.path.join(root, name) for name in names]
        return (*(path for path in below if os.path.isdir(path)), root)

    def _existing(self, path: str) -> str | None:
        """The path, or another spelling of it for which there is a file."""
        if self._listings.has(path):
            return path
        for spelling in _spellings(path):
            if spelling != path and self._listings.has(spelling):
                return spelling
        found = None if path.isascii() else self._listings.in_other_form(path)
        if found is None and os.path.splitext(path)[1].lower() not in IMAGE_SUFFIXES:
            found = self._listings.by_stem(path)
        return found


def _is_whole(name: str) -> bool:
    """Whether a name is a whole path, here or on another machine, and not relative to a folder."""
    return os.path.isabs(name) or name.startswith(("\\\\", _FILE_URL)) or _DRIVE.match(name) is not None


def _spellings(path: str) -> Iterator[str]:
    """Spellings of a path that other programs write."""
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(path)
    yield path.replace("\\", "/")
    yield os.path.join(folder, name.strip())
    yield stem + suffix.lower()
    yield stem + suffix.upper()
    if "%" in path:
        yield unquote(path)
    if suffix == ".0" and os.path.basename(stem).isdecimal():  # a number in a column with gaps, as pandas writes it
        yield from (stem + each for each in IMAGE_SUFFIXES)


def _candidates(annotations: Annotations, root: str | None) -> Iterator[str]:
    """Folders to look in, the most likely first."""
    stem = os.path.splitext(os.path.basename(annotations.path))[0]
    seen: set[str] = set()

    def unseen(folder: str) -> bool:
        return folder not in seen and not seen.add(folder)  # type: ignore[func-returns-value]

    if root is not None:
        yield root
        yield from _below(root, stem, likely=False)
        return
    home = annotations.home
    above = os.path.join(home, os.pardir)
    for folder in (home, *_captioned_folder(annotations.path), *_below(home, stem, likely=False), above):
        if unseen(folder):
            yield folder
    yield from filter(unseen, (*_below(above, stem, likely=True), ""))


def _below(folder: str, stem: str, *, likely: bool) -> list[str]:
    """The folders in `folder`, or those with a name usual for images; first those that are part of the annotations' name."""
    try:
        with os.scandir(folder or os.curdir) as found:
            names = [entry.name for entry in found if entry.is_dir() and not is_hidden(entry.name)]
    except (OSError, ValueError):
        return []
    order = {name: (name.casefold() not in stem.casefold(), not _LIKELY.fullmatch(name), name) for name in names}
    names = [name for name in names if not likely or _LIKELY.fullmatch(name)]
    return [os.path.join(folder, name) for name in sorted(names, key=order.__getitem__)]


def _captioned_folder(path: str) -> list[str]:
    """The folder that names in `path` are relative to, if `path` is captions with a run file that gives it."""
    with contextlib.suppress(OSError, ValueError), open(os.path.splitext(path)[0] + ".run.json", "rb") as file:
        run = json.load(file)
        if isinstance(run, dict) and isinstance(run.get("folder"), str):
            return [run["folder"]]
    return []
