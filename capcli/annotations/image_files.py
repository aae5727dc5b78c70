"""Where the images are that annotations name: below the folder given, or in one that lies near the annotations."""

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

# Folders beside the annotations' own that are taken unasked: another data set's photos may bear the same names.
_LIKELY = re.compile(
    r"(.*[-_ ])?(images?|imgs?|photos?|pictures?|pics|dataset|jpe?gs?)|(train|training|val|valid|validation|dev|test)(20\d\d)?",
    re.IGNORECASE,
)
_COCO = re.compile(r"COCO_((?:train|val|test)\d{4})_")
SAMPLE = 64  # names by which the folder is chosen


class Listings:
    """The names in folders, each folder listed once: quicker than a question for each of a hundred thousand files."""

    def __init__(self) -> None:
        self._files: dict[str, frozenset[str] | None] = {}
        self._stems: dict[str, dict[str, str]] = {}
        self._real: dict[str, str] = {}

    def files(self, folder: str) -> frozenset[str] | None:
        """Names of all in the folder that is no folder itself; None where it cannot be listed."""
        if folder not in self._files:
            self._files[folder] = _listed(folder)
        return self._files[folder]

    def holds(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in (self.files(folder) or ())

    def by_stem(self, path: str) -> str | None:
        """The image whose name is that of `path` and a suffix."""
        folder, name = os.path.split(path)
        if folder not in self._stems:
            pairs = (os.path.splitext(each) for each in sorted(self.files(folder) or (), reverse=True))
            self._stems[folder] = {stem: suffix for stem, suffix in pairs if suffix.lower() in IMAGE_SUFFIXES}
        suffix = self._stems[folder].get(name)
        return None if suffix is None else path + suffix

    def identity(self, path: str) -> str:
        """The file's path without links and detours in its folder: the same for two spellings of one path."""
        folder, name = os.path.split(path)
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder)
        return os.path.join(self._real[folder], name)


def _listed(folder: str) -> frozenset[str] | None:
    with contextlib.suppress(OSError, ValueError), os.scandir(folder or os.curdir) as found:
        return frozenset(entry.name for entry in found if not entry.is_dir())
    return None


class ImageFinder:
    """Where the images of one file of annotations are.

    The folder is chosen by the first names: the one, in `candidates`, in which most of them are. In it a name is first
    looked for in the folder that its row says (Karpathy's `filepath`, COCO's `train2014`, the split's), then as it is.
    """

    def __init__(self, annotations: Annotations, root: str | None, listings: Listings) -> None:
        self.candidates = tuple(_candidates(annotations, root))
        self._listings = listings
        self.root = self.candidates[0]
        self._below = cache(self._subfolders)

    def choose(self, sample: Sequence[tuple[str, str, str | None]]) -> None:
        """Settles on the folder by some names, each with the folder its row says and its split."""
        relative = [each for each in sample if not os.path.isabs(each[0])]
        hits = [sum(self._find(root, *each) is not None for each in relative) for root in self.candidates]
        self.root = self.candidates[hits.index(max(hits))]

    def find(self, name: str, folder: str, split: str | None) -> str | None:
        """The path of the image, or None."""
        return self._find(self.root, name, folder, split)

    def _find(self, root: str, name: str, folder: str, split: str | None) -> str | None:
        if os.path.isabs(name):
            return name if self._listings.holds(name) else None
        found = _COCO.match(name)
        for below in self._below(root, folder, split, found[1] if found else ""):
            path = self._spelt(os.path.join(below, name))
            if path is not None:
                return path
        return None

    def _subfolders(self, root: str, folder: str, split: str | None, release: str) -> tuple[str, ...]:
        words = [word for word, means in SPLITS.items() if means == split]
        names = dict.fromkeys(name for name in (folder, release, *words) if name)
        below = [os.path.join(root, name) for name in names]
        return (*(path for path in below if os.path.isdir(path)), root)

    def _spelt(self, path: str) -> str | None:
        """The path, or another spelling of it under which the file is there."""
        if self._listings.holds(path):
            return path
        folder, name = os.path.split(path)
        stem, suffix = os.path.splitext(path)
        other = [
            path.replace("\\", "/"),
            os.path.join(folder, name.strip()),
            stem + suffix.lower(),
            stem + suffix.upper(),
        ]
        other += [unicodedata.normalize(form, path) for form in ("NFC", "NFD")] if not path.isascii() else []
        for each in other:
            if each != path and self._listings.holds(each):
                return each
        return None if suffix.lower() in IMAGE_SUFFIXES else self._listings.by_stem(path)


def _candidates(annotations: Annotations, root: str | None) -> Iterator[str]:
    """Folders to look in, likeliest first."""
    stem = os.path.splitext(os.path.basename(annotations.path))[0]
    seen: set[str] = set()

    def fresh(folder: str) -> bool:
        return folder not in seen and not seen.add(folder)  # type: ignore[func-returns-value]

    if root is not None:
        yield root
        yield from _below(root, stem, likely=False)
        return
    home = annotations.home
    above = os.path.join(home, os.pardir)
    for folder in (home, *_receipt(annotations.path), *_below(home, stem, likely=False), above):
        if fresh(folder):
            yield folder
    yield from filter(fresh, (*_below(above, stem, likely=True), ""))


def _below(folder: str, stem: str, *, likely: bool) -> list[str]:
    """The folders in `folder`, or those that look as if they hold images; first those that the annotations' name names."""
    try:
        with os.scandir(folder or os.curdir) as found:
            names = [entry.name for entry in found if entry.is_dir() and not entry.name.startswith(".")]
    except (OSError, ValueError):
        return []
    order = {name: (name.casefold() not in stem.casefold(), not _LIKELY.fullmatch(name), name) for name in names}
    names = [name for name in names if not likely or _LIKELY.fullmatch(name)]
    return [os.path.join(folder, name) for name in sorted(names, key=order.__getitem__)]


def _receipt(path: str) -> list[str]:
    """The folder that `capcli caption` wrote down for the captions in `path`, where its names are relative to one."""
    with contextlib.suppress(OSError, ValueError), open(os.path.splitext(path)[0] + ".run.json", "rb") as file:
        receipt = json.load(file)
        if isinstance(receipt, dict) and isinstance(receipt.get("folder"), str):
            return [receipt["folder"]]
    return []
