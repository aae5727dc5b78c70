"""Finds the files of images that annotations name: in the folder that was given, or in one near the annotations."""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

from capcli.annotations.rows import SPLITS, Annotations
from capcli.sources import IMAGE_SUFFIXES

# Only folders with such names are tried beside the annotations' own: another data set may have images of the same names.
_LIKELY = re.compile(
    r"(.*[-_ ])?(images?|imgs?|photos?|pictures?|pics|dataset|jpe?gs?)|(train|training|val|valid|validation|dev|test)(20\d\d)?",
    re.IGNORECASE,
)
_COCO_NAME = re.compile(r"COCO_((?:train|val|test)\d{4})_")
SAMPLE = 64  # names by which the folder is chosen


class Listings:
    """The names in folders, each folder listed once: faster than a system call for each of a hundred thousand files."""

    def __init__(self) -> None:
        self._files: dict[str, frozenset[str] | None] = {}
        self._stems: dict[str, dict[str, str]] = {}
        self._real: dict[str, str] = {}

    def files(self, folder: str) -> frozenset[str] | None:
        """The names in the folder, without those of folders; None where it cannot be listed."""
        if folder not in self._files:
            self._files[folder] = _listed(folder)
        return self._files[folder]

    def has(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in (self.files(folder) or ())

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
        self.root = self.candidates[0]
        self._below = cache(self._subfolders)

    def choose(self, sample: Sequence[tuple[str, str, str | None]]) -> None:
        """Sets `root` by some images, each given as its name, its row's folder ("" if none) and its split."""
        relative = [image for image in sample if not os.path.isabs(image[0])]
        hits = [sum(self._find(root, *image) is not None for image in relative) for root in self.candidates]
        self.root = self.candidates[hits.index(max(hits))]

    def find(self, name: str, folder: str, split: str | None) -> str | None:
        """The path of the image, or None."""
        return self._find(self.root, name, folder, split)

    def _find(self, root: str, name: str, folder: str, split: str | None) -> str | None:
        if os.path.isabs(name):
            return name if self._listings.has(name) else None
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
        folder, name = os.path.split(path)
        stem, suffix = os.path.splitext(path)
        spellings = [
            path.replace("\\", "/"),
            os.path.join(folder, name.strip()),
            stem + suffix.lower(),
            stem + suffix.upper(),
        ]
        spellings += [unicodedata.normalize(form, path) for form in ("NFC", "NFD")] if not path.isascii() else []
        for spelling in spellings:
            if spelling != path and self._listings.has(spelling):
                return spelling
        return None if suffix.lower() in IMAGE_SUFFIXES else self._listings.by_stem(path)


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
            names = [entry.name for entry in found if entry.is_dir() and not entry.name.startswith(".")]
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
