"""From rows to images: an image's captions together, whatever rows and files they stood in, and its file found."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from capcli.annotations.data_report import EMPTY, MISSING, UNREAD, WITHOUT, DataReport
from capcli.annotations.image_files import SAMPLE, ImageFinder, Listings
from capcli.annotations.rows import Annotations, texts
from capcli.errors import CapcliError
from capcli.records import Annotated, Stored
from capcli.text import brief, counted, printable, tag_text

_HELD_OUT = {None: 0, "train": 1, "val": 2, "test": 3}


@dataclass(slots=True)
class Image:
    """One image while its captions come together."""

    name: str
    file: Annotations
    split: str | None
    folder: str
    stored: Stored | None
    captions: tuple[str, ...] = ()
    empty: int = 0
    source: tuple[Annotations, str | None] | None = None  # the file that spoke last, and the split in it
    elsewhere: frozenset[str] = frozenset()  # captions that others say
    tags: str = ""

    def add(self, file: Annotations, split: str | None, values: Sequence[object]) -> None:
        """A caption that one file says twice was said by two people, and CIDEr counts both; what a second file repeats,
        or a second split, is the same caption again."""
        if (file, split) != self.source:
            self.file, self.source, self.elsewhere = file, (file, split), frozenset(self.captions)
        kept, empty = texts(values)
        self.captions += tuple(text for text in kept if text not in self.elsewhere) if self.elsewhere else tuple(kept)
        self.empty += empty


def gather(files: Iterable[Annotations], report: DataReport, *, by_file: bool) -> list[Image]:
    """The images of these files in the order in which they appear, told apart by name, or by file and name.

    An image whose rows are in several splits is in the one that is held out most: it has been seen by whoever trains on
    any of its rows.
    """
    gathered: dict[str | None, dict[Hashable, Image]] = {}
    torn: set[str] = set()
    for file in files:
        nameless = unread = 0
        fault: CapcliError | None = None
        read = False
        images = gathered.setdefault(os.path.realpath(file.path) if by_file else None, {})
        for row in file.rows():
            if row.fault is not None:
                unread, fault = unread + 1, fault or row.fault
                report.add(file.path, UNREAD, str(row.fault).removeprefix(f"{printable(file.path)}: "))
                continue
            read = True
            if not row.name:
                nameless += 1
                continue
            name = row.name.strip() if "://" in row.name else row.name
            key = row.identity or normal(name)
            image = images.get(key)
            if image is None:
                image = images[key] = Image(name, file, row.split, row.folder, row.image)
            elif row.split != image.split:
                if row.split and image.split:
                    torn.add(image.name)
                image.split = max(row.split, image.split, key=_HELD_OUT.__getitem__)
            image.add(file, row.split, row.captions)
            if row.tags is not None and not image.tags:
                image.tags = tag_text(row.tags)
        if fault is not None and not read:
            raise fault
        if fault is not None:
            found = (
                f"{counted(unread, 'row')} of {printable(file.path)} cannot be read: passed over; the first: {fault}"
            )
            report.notes.append(found)
            report.fault = report.fault or fault
        if nameless:
            report.notes.append(
                f"{counted(nameless, 'row')} of {printable(file.path)} without an image's name: passed over"
            )
    note_torn(torn, report)
    return [image for images in gathered.values() for image in images.values()]


def note_torn(names: set[str], report: DataReport) -> None:
    if names:
        found = f"{counted(len(names), 'image')} in more than one split, such as {brief(min(names))}"
        report.notes.append(f"{found}: kept for test before validation, and for validation before training")


def normal(name: str) -> str:
    """One spelling for the spellings of a name."""
    return name if "://" in name else os.path.normpath(name)


def annotated(
    images: Sequence[Image], root: str | None, report: DataReport, *, locate: bool, keep_missing: bool
) -> list[Annotated]:
    """Those that can be used: with a caption and, where `locate` asks for it, with a file that is there.

    What is left out goes into the report. Images that turn out to be one file become one. With `keep_missing` one whose
    file is not there stays, with the path that it would have, unless none is there.
    """
    captioned = [image for image in images if _has_captions(image, report)]
    if not locate:
        return [Annotated(image.name, None, image.captions, image.split, image.tags) for image in captioned]
    listings = Listings()
    places = _places(captioned, root, listings)
    found: dict[str, int] = {}
    torn: set[str] = set()
    missing = 0
    result: list[Annotated] = []
    for image in captioned:
        if image.stored is not None:
            result.append(Annotated(image.name, image.stored, image.captions, image.split, image.tags))
            continue
        place = places[image.file]
        path = place.find(image.name, image.folder, image.split)
        if path is None and keep_missing:
            path = os.path.join(place.root, image.name)
            missing += listings.identity(path) not in found
        if path is None:
            what = "it is a folder" if os.path.isdir(os.path.join(place.root, image.name)) else "there is no such file"
            report.add(image.name, MISSING, f"{what} in {printable(place.root or os.curdir)}")
            continue
        position = found.setdefault(listings.identity(path), len(result))
        item = Annotated(image.name, path, image.captions, image.split, image.tags)
        if position == len(result):
            result.append(item)
        else:
            if item.split and result[position].split not in (None, item.split):
                torn.add(item.name)
            result[position] = _joined(result[position], item)
    note_torn(torn, report)
    return result if len(result) > missing else []


def _has_captions(image: Image, report: DataReport) -> bool:
    for _ in range(image.empty):
        report.add(image.name, EMPTY, "the caption is empty")
    if not image.captions and not image.empty:
        report.add(image.name, WITHOUT, f"{os.path.basename(image.file.path)} has no caption of it")
    return bool(image.captions)


def _joined(first: Annotated, second: Annotated) -> Annotated:
    fresh = tuple(text for text in second.captions if text not in first.captions)
    split = max(first.split, second.split, key=_HELD_OUT.__getitem__)
    return replace(first, captions=first.captions + fresh, split=split, tags=first.tags or second.tags)


def _places(images: Sequence[Image], root: str | None, listings: Listings) -> dict[Annotations, ImageFinder]:
    """Where the images of each file of annotations are, by the first of them."""
    samples: dict[Annotations, list[tuple[str, str, str | None]]] = {}
    for image in images:
        if image.stored is None:
            sample = samples.setdefault(image.file, [])
            if len(sample) < SAMPLE:
                sample.append((image.name, image.folder, image.split))
    places = {file: ImageFinder(file, root, listings) for file in samples}
    for file, place in places.items():
        place.choose(samples[file])
    return places


def usable(
    images: Sequence[Image], root: str | None, report: DataReport, *, locate: bool, keep_missing: bool = False
) -> list[Annotated]:
    """`annotated`, of which there must be some: raises CapcliError that says what was looked for, and where."""
    found = annotated(images, root, report, locate=locate, keep_missing=keep_missing)
    if found:
        return found
    first = next((image for image in images if image.captions), images[0])
    file = first.file
    read = f"{printable(file.path)}, read as {file.format}"
    if not first.captions:
        columns = f" (columns: {', '.join(map(printable, file.columns[:20]))})" if file.columns else ""
        raise CapcliError(f"no image has a caption, the first being {brief(first.name)} in {read}{columns}")
    if "://" in first.name:
        raise CapcliError(
            f"{read}, names addresses such as {brief(first.name)}: capcli prepare --url-column downloads them"
        )
    tried = dict.fromkeys(
        os.path.normpath(folder or os.curdir) for folder in ImageFinder(file, root, Listings()).candidates
    )
    raise CapcliError(
        f"none of {counted(len(images), 'image')} is there. {read}, names {brief(first.name)}, which was looked for in "
        f"{', '.join(map(printable, tried))}; say where the images are with --image-root"
    )
