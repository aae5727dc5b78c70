"""The captions of each image, collected from all rows and files that list it, and the image's own file."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from capcli.annotations.data_report import EMPTY, MISSING, UNREAD, WITHOUT, DataReport
from capcli.annotations.image_files import SAMPLE, FoundImage, ImageFinder, Listings
from capcli.annotations.name_matching import composed
from capcli.annotations.rows import Annotations, Row, texts
from capcli.errors import CapcliError
from capcli.records import Annotated, Stored
from capcli.text import brief, counted, printable, tag_text

_RANK = {None: 0, "train": 1, "val": 2, "test": 3}  # of several splits of an image, the highest counts


@dataclass(slots=True)
class GatheredImage:
    """One image while its captions are gathered."""

    name: str
    file: Annotations
    split: str | None
    folder: str
    stored: Stored | None
    captions: tuple[str, ...] = ()
    empty: int = 0  # captions that are empty
    source: tuple[Annotations, str | None] | None = None  # the file and split of the last captions
    earlier: frozenset[str] = frozenset()  # captions from other files and splits
    tags: str = ""

    def add(self, file: Annotations, split: str | None, values: Sequence[object]) -> None:
        """Adds captions. A repetition within a file and split is kept: two annotators wrote it, and CIDEr counts both.
        A repetition of another file's or split's caption is the same caption again, and is dropped."""
        if (file, split) != self.source:
            self.file, self.source, self.earlier = file, (file, split), frozenset(self.captions)
        kept, empty = texts(values)
        self.captions += tuple(text for text in kept if text not in self.earlier) if self.earlier else tuple(kept)
        self.empty += empty


def gather(files: Iterable[Annotations], report: DataReport, *, by_file: bool) -> list[GatheredImage]:
    """The images of these files in order of appearance, identified by name or, with `by_file`, by file and name.

    An image in several splits is assigned to test, else to val, so that no held-out image is used for training.
    Rows that cannot be read go into the report; CapcliError is raised where a file has no other rows.
    """
    gathered: dict[str | None, dict[Hashable, GatheredImage]] = {}
    in_several: set[str] = set()
    files_of: dict[Hashable, set[Annotations]] = {}  # of names that another Unicode form may be equal to
    for file in files:
        images = gathered.setdefault(os.path.realpath(file.path) if by_file else None, {})
        faults: list[CapcliError] = []
        remarks: dict[str, set[str]] = {}
        nameless = named = 0
        for row in file.rows():
            row = _checked(row, file)
            if row.fault is not None:
                faults.append(row.fault)
                report.add(row.name or file.path, UNREAD, str(row.fault).removeprefix(f"{printable(file.path)}: "))
            elif not row.name:
                nameless += 1
            else:
                named += 1
                _add_row(row, file, images, in_several)
                if not row.name.isascii():
                    files_of.setdefault(_key(row), set()).add(file)
                if row.remark:
                    remarks.setdefault(row.remark, set()).add(row.name)
        if faults and not named + nameless:
            raise faults[0]
        if faults:
            rows = f"{counted(len(faults), 'row')} of {printable(file.path)} cannot be read"
            report.notes.append(f"{rows}: skipped; the first: {faults[0]}")
            report.fault = report.fault or faults[0]
        if nameless:
            rows = f"{counted(nameless, 'row')} of {printable(file.path)}"
            report.notes.append(f"{rows} without an image's name: skipped")
        report.notes += [f"{counted(len(names), 'image')} {remark}" for remark, names in remarks.items()]
        report.notes += file.notes
    if not by_file:
        _merge_spellings(gathered.get(None, {}), files_of)
    note_several_splits(in_several, report)
    return [image for images in gathered.values() for image in images.values()]


def _checked(row: Row, file: Annotations) -> Row:
    """The row; one whose name no file can have has a fault."""
    if "\0" not in row.name:
        return row
    return Row.unreadable(CapcliError(f"{printable(file.path)}: the name {brief(row.name)} has a NUL byte"))


def _key(row: Row) -> Hashable:
    """What identifies the image of a row."""
    return row.identity or normal(row.name.strip() if "://" in row.name else row.name)


def _merge_spellings(images: dict[Hashable, GatheredImage], files_of: Mapping[Hashable, set[Annotations]]) -> None:
    """Makes one image of those whose names differ in their Unicode form alone, unless one file lists both."""
    spellings: dict[str, list[Hashable]] = {}
    for key in files_of:
        spellings.setdefault(composed(images[key].name), []).append(key)
    for first, *others in spellings.values():
        files = [file for key in (first, *others) for file in files_of[key]]
        if len(set(files)) < len(files):
            continue
        for other in map(images.pop, others):
            image = images[first]
            image.captions += tuple(text for text in other.captions if text not in image.captions)
            image.empty += other.empty
            image.split = max(image.split, other.split, key=_RANK.__getitem__)
            image.tags = image.tags or other.tags


def _add_row(row: Row, file: Annotations, images: dict[Hashable, GatheredImage], in_several: set[str]) -> None:
    key = _key(row)
    image = images.get(key)
    if image is None:
        name = row.name.strip() if "://" in row.name else row.name
        image = images[key] = GatheredImage(name, file, row.split, row.folder, row.image)
    elif row.split != image.split:
        if row.split and image.split:
            in_several.add(image.name)
        image.split = max(row.split, image.split, key=_RANK.__getitem__)
    image.add(file, row.split, row.captions)
    if row.tags is not None and not image.tags:
        image.tags = tag_text(row.tags)


def note_several_splits(names: set[str], report: DataReport) -> None:
    if names:
        images = f"{counted(len(names), 'image')} in more than one split, such as {brief(min(names))}"
        report.notes.append(f"{images}: test takes precedence over validation, and validation over training")


def normal(name: str) -> str:
    """The canonical form of a relative path; a URL is left unchanged."""
    return name if "://" in name else os.path.normpath(name)


def usable(
    images: Sequence[GatheredImage], root: str | None, report: DataReport, *, locate: bool, keep_missing: bool = False
) -> list[Annotated]:
    """The images that have a caption and, with `locate`, a file; the report gets the others. Two names of one file are
    one image. With `keep_missing` an image whose file is missing keeps the path it would have, unless all are missing.

    Raises CapcliError where no image is left, with what was looked for and where.
    """
    captioned = [image for image in images if _has_captions(image, report)]
    if not locate:
        found = [Annotated(image.name, None, image.captions, image.split, image.tags) for image in captioned]
    else:
        found = _located(captioned, root, report, keep_missing=keep_missing)
    if not found and not captioned and report.fault is not None:
        raise report.fault
    if not found:
        raise _nothing_usable(images, root)
    return found


def _has_captions(image: GatheredImage, report: DataReport) -> bool:
    for _ in range(image.empty):
        report.add(image.name, EMPTY, "the caption is empty")
    if not image.captions and not image.empty:
        report.add(image.name, WITHOUT, f"{os.path.basename(image.file.path)} has no caption of it")
    return bool(image.captions)


def _located(
    images: Sequence[GatheredImage], root: str | None, report: DataReport, *, keep_missing: bool
) -> list[Annotated]:
    listings = Listings()
    finders = _finders(images, root, listings)
    found = {
        id(image): finders[image.file].find(image.name, image.folder, image.split)
        for image in images
        if image.stored is None
    }
    shared = _shared_by_ends(images, found)
    positions: dict[str, int] = {}  # in the result, by file
    in_several: set[str] = set()
    missing = 0
    result: list[Annotated] = []
    for image in images:
        if image.stored is not None:
            result.append(Annotated(image.name, image.stored, image.captions, image.split, image.tags))
            continue
        finder, place = finders[image.file], found[id(image)]
        path = None if place is None or place.path in shared else place.path
        if path is None and keep_missing:
            path = os.path.join(finder.root, image.name)
            missing += listings.identity(path) not in positions
        if path is None:
            reason = f"the names of several images end in {brief(os.path.basename(place.path))}" if place else None
            report.add(image.name, MISSING, reason or _why_missing(image.name, finder.root))
            continue
        position = positions.setdefault(listings.identity(path), len(result))
        item = Annotated(image.name, path, image.captions, image.split, image.tags)
        if position == len(result):
            result.append(item)
        else:
            if item.split and result[position].split not in (None, item.split):
                in_several.add(item.name)
            result[position] = _merged(result[position], item)
    note_several_splits(in_several, report)
    return result if len(result) > missing else []


def _shared_by_ends(images: Iterable[GatheredImage], found: Mapping[int, FoundImage | None]) -> set[str]:
    """The paths that were found by the ends of several names: which of them is meant is not known."""
    names: dict[str, set[str]] = {}
    for image in images:
        place = found.get(id(image))
        if place is not None and place.by_end:
            names.setdefault(place.path, set()).add(composed(image.name))
    return {path for path, of_path in names.items() if len(of_path) > 1}


def _why_missing(name: str, root: str) -> str:
    what = "it is a folder" if os.path.isdir(os.path.join(root, name)) else "there is no such file"
    return f"{what} in {printable(root or os.curdir)}"


def _merged(first: Annotated, second: Annotated) -> Annotated:
    more = tuple(text for text in second.captions if text not in first.captions)
    split = max(first.split, second.split, key=_RANK.__getitem__)
    return replace(first, captions=first.captions + more, split=split, tags=first.tags or second.tags)


def _finders(images: Sequence[GatheredImage], root: str | None, listings: Listings) -> dict[Annotations, ImageFinder]:
    """For each annotation file a finder of its images, which has chosen its folder by the first of them."""
    samples: dict[Annotations, list[tuple[str, str, str | None]]] = {}
    for image in images:
        if image.stored is None:
            sample = samples.setdefault(image.file, [])
            if len(sample) < SAMPLE:
                sample.append((image.name, image.folder, image.split))
    finders = {file: ImageFinder(file, root, listings) for file in samples}
    for file, finder in finders.items():
        finder.choose(samples[file])
    return finders


def _nothing_usable(images: Sequence[GatheredImage], root: str | None) -> CapcliError:
    first = next((image for image in images if image.captions), images[0])
    file = first.file
    read = f"{printable(file.path)}, read as {file.format}"
    if not first.captions:
        columns = f" (columns: {', '.join(map(printable, file.columns[:20]))})" if file.columns else ""
        return CapcliError(f"no image has a caption; the first is {brief(first.name)} in {read}{columns}")
    if "://" in first.name and not first.name.startswith("file:"):
        url = brief(first.name)
        return CapcliError(f"{read}, names URLs such as {url}: capcli prepare --url-column downloads them")
    candidates = ImageFinder(file, root, Listings()).candidates
    tried = dict.fromkeys(os.path.normpath(folder or os.curdir) for folder in candidates)
    return CapcliError(
        f"none of {counted(len(images), 'image')} was found. {read}, names {brief(first.name)}, which was looked for in "
        f"{', '.join(map(printable, tried))}; name the folder of the images with --image-root"
    )
