"""Reads captions and references from files of every supported annotation format."""

from __future__ import annotations

import contextlib
import json
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
ONE_ROW_EACH = (RESULTS, "JSON lines")  # formats of captioners' output, where a second row for an image is an error


@dataclass
class Captions:
    """A captioner's captions by image name. An empty caption counts; of several in one row the first is taken.

    `several` is the number of images with further captions in a table or annotation file. `numbered`: the names are COCO's
    image numbers. `failed` are the images that `capcli caption` could not caption.
    """

    path: str
    texts: dict[str, str] = field(default_factory=dict)
    several: int = 0
    numbered: bool = False
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class References:
    """Reference captions by image name, at least one for each image."""

    texts: Mapping[str, Sequence[str]]
    paths: tuple[str, ...]


@dataclass(frozen=True)
class NamedColumns:
    """The columns named by options. Each applies to the files that have it, as captions and references may differ."""

    columns: Mapping[str, Any]
    found: set[str] = field(default_factory=set)
    errors: list[UsageError] = field(default_factory=list)

    def read_with(self, read: Callable[[DataOptions], T]) -> T:
        """The result of `read` with as many of the columns as its file has; raises what `read` raises."""
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
        raise AssertionError("unreachable: the last attempt names no column")

    def check(self) -> None:
        """Raises UsageError for a column that no file has."""
        missing = [repr(column) for name, column in self.columns.items() if name not in self.found]
        if missing:
            raise next((each for each in self.errors if missing[0] in str(each)), self.errors[0])


def read_captions(path: str, named: NamedColumns) -> Captions:
    """Read one file of captions, `-` for standard input.

    Raises CapcliError where no image has a caption, or an image has two different rows in a captioner's output.
    """
    with as_file(path) as file:
        captions = named.read_with(partial(_captions, "standard input" if path == "-" else path, file))
    captions.failed = tuple(name for name in failed_images(path) if name not in captions.texts)
    return captions


def failed_images(path: str) -> Iterator[str]:
    """The names in the list of failures that `capcli caption` writes beside a file of captions; none without such a list."""
    try:
        with open(f"{os.path.splitext(path)[0]}.failures.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError):
        return
    for row in rows:
        if isinstance(row, dict) and isinstance(row.get("file_name"), str):
            yield row["file_name"]


def _captions(title: str, file: str, options: DataOptions) -> Captions:
    from capcli.annotations.formats import recognise
    from capcli.annotations.rows import texts

    captions = Captions(title)
    with_more: set[str] = set()
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
                    "keep one row for each image"
                )
            if first != text:
                with_more.add(row.name)
    if not captions.texts:
        raise CapcliError(f"there is no caption in {printable(captions.path)}")
    captions.several = len(with_more)
    return captions


def read_references(paths: Sequence[str], named: NamedColumns, split: str | None) -> References:
    """Read all files together; the captions of an image in several files are combined.

    Raises CapcliError where no image has a caption, and UsageError where no image is in `split`.
    """
    from capcli.annotations import DataReport, read_annotations

    def read(options: DataOptions) -> list[Annotated]:
        report = DataReport()
        images = list(read_annotations(paths, options, locate=False, report=report))
        if report.fault is not None:  # scores against a part of the references would look like those against all
            raise report.fault
        return images

    found = named.read_with(read)
    kept = [image for image in found if split is None or image.split == split]
    if not kept:
        splits = ", ".join(sorted({image.split or "none" for image in found}))
        raise UsageError(f"{', '.join(map(printable, paths))}: no image is in the split {split}; there are: {splits}")
    return References({image.name: image.captions for image in kept}, tuple(paths))


def names_by_number(paths: Sequence[str]) -> dict[str, str]:
    """Image names by COCO's number, from these annotations; a number with two different names is left out."""
    from capcli.annotations.text_files import head, parsed, readable

    names: dict[str, str] = {}
    ambiguous: set[str] = set()
    for path in filter(os.path.isfile, paths):
        if not head(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            continue
        with readable(path), open(path, "rb") as file:
            content = file.read()
        with contextlib.suppress(CapcliError):  # JSON lines have no numbers
            for number, name in _numbered(parsed(content, path)):
                if names.setdefault(number, name) != name:
                    ambiguous.add(number)
    return {number: name for number, name in names.items() if number not in ambiguous}


def _numbered(document: Any) -> Iterator[tuple[str, str]]:
    images = document.get("images") if isinstance(document, dict) else None
    for image in images if isinstance(images, list) else ():
        if not isinstance(image, dict):
            continue
        number = image.get("id", image.get("cocoid"))
        name = image.get("file_name") or image.get("filename")
        if number is not None and name:
            yield str(number), str(name)


@contextlib.contextmanager
def as_file(path: str) -> Iterator[str]:
    """The path, or that of a copy of standard input: recognising the format reads the file more than once."""
    if path != "-":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="capcli-") as folder:
        copy = os.path.join(folder, "standard input")
        with open(copy, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield copy
