"""Folders of images whose captions are in text or JSON files beside them, or whose labels are the names of the folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from capcli.annotations.name_matching import NameIndex
from capcli.annotations.rows import SPLITS, Annotations, Row, caption_columns, captions_of
from capcli.annotations.text_files import decoded, line_fault, parsed, readable
from capcli.errors import CapcliError
from capcli.sources import IMAGE_SUFFIXES
from capcli.sources.files import walk
from capcli.sources.hidden import is_hidden, omission
from capcli.text import printable

SIDECARS = (".caption", ".txt", ".json")  # where several exist the first is read; kohya reads the first two
_LINE_END = re.compile("\r\n|\r|\n")
_SEVERAL_LINES = (
    "with several lines in the text file, of which each is a caption (--text-files whole reads one caption)"
)


def captioned_folder(path: str, *, whole: bool) -> Annotations | None:
    """The images below the folder at `path` with the captions beside them; None where no image has any.

    The lines of a text file are captions or, with `whole`, the file is one. The files of `photo.jpg` are `photo.txt` and
    `photo.jpg.txt`, and the same with `.caption` and `.json`.
    """
    notes: list[str] = []
    reader = SidecarReader(path, whole, notes)
    if not any(row.captions or row.fault for row in reader.rows(only_captioned=True)):
        return None
    notes.clear()
    return Annotations(path, "folder of images with text files beside them", reader.rows, path, notes=notes)


def class_folders(path: str, template: str) -> Annotations:
    """The images in folders, each with the template and the label of its folder as caption. Raises CapcliError for none."""
    notes: list[str] = []
    rows = partial(_class_rows, path, template, notes)
    if next(rows(), None) is None:
        raise CapcliError(f"{printable(path)} has no folders of images, whose names would be labels")
    return Annotations(path, "folders of images, one per class", rows, path, notes=notes)


def split_folder(name: str) -> str | None:
    """The split whose images a folder of this name holds; None for a folder of another name."""
    return SPLITS.get(name.casefold())


@dataclass(frozen=True)
class SidecarReader:
    """Reads the captions beside the images in the folder `path`. Lines to show are added to `notes`."""

    path: str
    whole: bool
    notes: list[str] = field(default_factory=list)

    def rows(self, *, only_captioned: bool = False) -> Iterator[Row]:
        """A row per image in the order of names; with `only_captioned` without those of images that have no file beside."""
        names_here: list[str] = []  # the walk yields one folder's names together
        folder = ""
        for name in _visible(self.path, (*IMAGE_SUFFIXES, *SIDECARS), self.notes):
            here = os.path.dirname(name)
            if here != folder:
                yield from self._folder(folder, names_here, only_captioned=only_captioned)
                folder, names_here = here, []
            names_here.append(os.path.basename(name))
        yield from self._folder(folder, names_here, only_captioned=only_captioned)

    def _folder(self, folder: str, names: Sequence[str], *, only_captioned: bool) -> Iterator[Row]:
        """The rows of one folder, whose files have these names."""
        sidecars = {suffix: _SidecarNames(names, suffix) for suffix in SIDECARS}
        split = split_folder(folder.partition("/")[0])
        for name in names:
            if _suffix(name) in SIDECARS:
                continue
            found = next(filter(None, (of_suffix.beside(name) for of_suffix in sidecars.values())), None)
            if found is not None or not only_captioned:
                path = f"{folder}/{name}" if folder else name
                yield Row(path, (), split) if found is None else self._row(path, os.path.join(folder, found), split)

    def _row(self, name: str, sidecar: str, split: str | None) -> Row:
        """The row of one image; with a fault where the file beside it cannot be read."""
        path = os.path.join(self.path, sidecar)
        try:
            text = _text(path)
            if _suffix(sidecar) == ".json":
                return Row(name, _json_captions(text, path, name), split)
        except CapcliError as error:
            return Row.unreadable(error, name)
        lines = [line for line in _LINE_END.split(text) if line.strip()] or [""]
        if self.whole:
            return Row(name, (" ".join(map(str.strip, lines)),), split)
        return Row(name, lines, split, remark=_SEVERAL_LINES if len(lines) > 1 else "")


class _SidecarNames:
    """The files of one suffix in a folder, without the suffix."""

    def __init__(self, names: Sequence[str], suffix: str) -> None:
        self._files = {name[: -len(suffix)]: name for name in names if _suffix(name) == suffix}
        self._index = NameIndex(self._files)

    def beside(self, image: str) -> str | None:
        """The file whose name is that of the image, or its stem, plus the suffix."""
        if not self._files:
            return None
        found = self._index.find(image) or self._index.find(os.path.splitext(image)[0])
        return None if found is None else self._files[found]


def _text(path: str) -> str:
    """The text of a small file. Raises CapcliError where it cannot be read or has bytes that are no text."""
    with readable(path), open(path, "rb") as file:
        text = decoded(file.read())
    if "\0" in text or not text.isascii():
        for number, line in enumerate(_LINE_END.split(text), 1):
            if (fault := line_fault(line, path, number)) is not None:
                raise fault
    return text


def _json_captions(text: str, path: str, image: str) -> Sequence[object]:
    """The captions in the JSON file of one image; a title that is the image's own name is not one."""
    content = parsed(text, path)
    if isinstance(content, dict):
        cells = [content[column] for column in caption_columns(list(content), None)]
    elif isinstance(content, str | list):
        cells = [content]
    else:
        raise CapcliError(f"{printable(path)} is a {type(content).__name__}, and not an object with a caption")
    file = os.path.basename(image)
    captions = [caption for cell in cells for caption in captions_of(cell)]
    return [caption for caption in captions if caption not in (file, os.path.splitext(file)[0])]


def _class_rows(path: str, template: str, notes: list[str]) -> Iterator[Row]:
    """Images in folders, each with the label of its folder as caption; a folder of a split is not a label."""
    for name in _visible(path, IMAGE_SUFFIXES, notes):
        first, *_ = folders = name.split("/")[:-1] or [""]
        split = split_folder(first)
        if label := folders[-1] if len(folders) > (split is not None) else "":
            yield Row(name, (template.replace("{label}", label),), split)


def _visible(path: str, suffixes: Sequence[str], notes: list[str]) -> Iterator[str]:
    """The names of the files below the folder that have these suffixes and are not hidden.

    A note is added for folders of other programs, and for each that cannot be listed.
    """

    def enters(name: str) -> bool:
        if (line := omission(name)) is not None and line not in notes:
            notes.append(line)
        return not is_hidden(name)

    def note(line: str) -> None:
        if line not in notes:
            notes.append(line)

    yield from walk(path, enters, lambda name: _suffix(name) in suffixes and not is_hidden(name), note)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
