"""Captions and references from files of any format that annotations come in."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.records import Annotated
from capcli.text import brief, printable

T = TypeVar("T")
RESULTS = "COCO results"
ONE_ROW_EACH = (RESULTS, "JSON lines")  # formats of captioners' output, where a second row is a mistake


@dataclass
class Captions:
    """A captioner's captions by image name. An empty one counts; of several in one row the first is the best.

    `several` counts the images about which a table or a file of annotations has more to say than the first caption.
    `numbered` says that the names are COCO's numbers.
    """

    path: str
    texts: dict[str, str] = field(default_factory=dict)
    several: int = 0
    numbered: bool = False


@dataclass(frozen=True)
class References:
    """What people said of images, by image name, at least one caption of each."""

    texts: Mapping[str, Sequence[str]]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """The columns that were named, each for the files that have it: captions and references may call theirs otherwise."""

    columns: Mapping[str, Any]
    found: set[str] = field(default_factory=set)
    errors: list[UsageError] = field(default_factory=list)

    def reading(self, read: Callable[[DataOptions], T]) -> T:
        """What `read` makes of the file with as many of the columns as it has; raises what it raises."""
        for number in range(len(self.columns), -1, -1):
            for names in combinations(self.columns, number):
                try:
                    result = read(DataOptions(**{name: self.columns[name] for name in names}))
                except UsageError as error:
                    if not names:
                        raise
                    self.errors.append(error)
                else:
                    self.found.update(names)
                    return result
        raise AssertionError("the last is without any")

    def check(self) -> None:
        """Raises UsageError for a column that no file has."""
        missing = [repr(column) for name, column in self.columns.items() if name not in self.found]
        if missing:
            raise next((each for each in self.errors if missing[0] in str(each)), self.errors[0])


def read_captions(path: str, given: Given) -> Captions:
    """Reads one file of captions, `-` for standard input.

    Raises CapcliError for a file in which no image has a caption, or one image has two rows that differ.
    """
    with on_disk(path) as file:
        return given.reading(partial(_captions, "standard input" if path == "-" else path, file))


def _captions(called: str, file: str, options: DataOptions) -> Captions:
    from capcli.annotations.formats import recognise
    from capcli.annotations.rows import texts

    captions = Captions(called)
    more: set[str] = set()
    for part in recognise(file, options):
        captions.numbered |= part.format == RESULTS
        for row in part.rows():
            if not row.read().captions:
                continue
            kept, _ = texts(row.captions[:1])
            text = kept[0] if kept else ""
            first = captions.texts.setdefault(row.name, text)
            if first != text and part.format in ONE_ROW_EACH:
                raise CapcliError(
                    f"{printable(captions.path)} has two captions of {brief(row.name)}, {first!r} and {text!r}: "
                    "leave one row for each image"
                )
            if first != text:
                more.add(row.name)
    if not captions.texts:
        raise CapcliError(f"there is no caption in {printable(captions.path)}")
    captions.several = len(more)
    return captions


def read_references(paths: Sequence[str], given: Given, split: str | None) -> References:
    """Reads all of these together: what several say of one image is put together.

    Raises CapcliError where no image has a caption, and UsageError where none is in the split that was asked for.
    """
    from capcli.annotations import DataReport, read_annotations

    def read(options: DataOptions) -> list[Annotated]:
        report = DataReport()
        images = list(read_annotations(paths, options, locate=False, report=report))
        if report.fault is not None:  # figures of a part of the references would be taken for those of all
            raise report.fault
        return images

    found = given.reading(read)
    kept = [image for image in found if split is None or image.split == split]
    if not kept:
        splits = ", ".join(sorted({image.split or "none" for image in found}))
        raise UsageError(f"{', '.join(map(printable, paths))}: no image is in the split {split}; there are: {splits}")
    return References({image.name: image.captions for image in kept}, tuple(paths))


def names_by_number(paths: Sequence[str]) -> dict[str, str]:
    """COCO's number of each image in these annotations, to its name; numbers of two images are left out."""
    from capcli.annotations.text_files import head, parsed, readable

    names: dict[str, str] = {}
    twice: set[str] = set()
    for path in filter(os.path.isfile, paths):
        if not head(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            continue
        with readable(path), open(path, "rb") as file:
            content = file.read()
        with contextlib.suppress(CapcliError):  # JSON lines, which number nothing
            for number, name in _numbered(parsed(content, path)):
                if names.setdefault(number, name) != name:
                    twice.add(number)
    return {number: name for number, name in names.items() if number not in twice}


def _numbered(document: Any) -> Iterator[tuple[str, str]]:
    images = document.get("images") if isinstance(document, dict) else None
    for image in images if isinstance(images, list) else ():
        number = image.get("id", image.get("cocoid"))
        name = image.get("file_name") or image.get("filename")
        if number is not None and name:
            yield str(number), str(name)


@contextlib.contextmanager
def on_disk(path: str) -> Iterator[str]:
    """The file itself, or a copy of standard input: what recognises a format looks into it more than once."""
    if path != "-":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="capcli-") as folder:
        copy = os.path.join(folder, "standard input")
        with open(copy, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield copy
