"""Folders of annotations: imagefolders, images with text files beside them, and datasets on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from capcli.annotations.datasets import is_stored, stored_annotations
from capcli.annotations.rows import SPLITS, Annotations, Row
from capcli.annotations.text_files import lines
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.sources import IMAGE_SUFFIXES
from capcli.sources.files import walk
from capcli.text import printable

METADATA = tuple(f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet"))  # Hugging Face imagefolder's
_SIDECARS = (".caption", ".txt")  # kohya's; the more telling first

Reader = Callable[[str, DataOptions], Annotations]


def folder_annotations(path: str, options: DataOptions, read: Reader) -> list[Annotations]:
    """The annotations in the folder at `path`; `read` reads a file of them.

    Raises CapcliError that says what was looked for, and what is there, where there are none.
    """
    if is_stored(path):
        return [stored_annotations(path, options)]
    found = [_imagefolder(path, read(each, options)) for each in _metadata(path)]
    if found:
        return found
    if options.label_template is not None:
        rows = partial(_class_rows, path, options.label_template)
        if next(rows(), None) is None:
            raise CapcliError(f"{printable(path)} holds no folders of images, whose names would be labels")
        return [Annotations(path, "folders of images, one a class", rows, path)]
    if next(_sidecar_rows(path, only_captioned=True), None) is not None:
        return [Annotations(path, "folder of images with text files beside them", partial(_sidecar_rows, path), path)]
    raise _nothing_known(path)


def _metadata(path: str) -> list[str]:
    """The metadata files of the folder and of the splits' folders in it, one of each folder."""
    folders = [path, *sorted(entry.path for entry in _entries(path) if entry.is_dir() and _split(entry.name))]
    files = ([os.path.join(folder, name) for name in METADATA] for folder in folders)
    return [each for each in (next(filter(os.path.isfile, three), None) for three in files) if each is not None]


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return list(found)
    except OSError as error:
        raise CapcliError(f"{printable(path)}: {error.strerror or error}") from None


def _split(name: str) -> str | None:
    return SPLITS.get(name.casefold())


def _imagefolder(path: str, metadata: Annotations) -> Annotations:
    """Metadata whose names become relative to the folder at `path`, and whose splits are the first of their folders."""
    below = os.path.relpath(metadata.home or os.curdir, path or os.curdir)

    def rows() -> Iterator[Row]:
        for row in metadata.rows():
            if row.fault is not None:
                yield row
                continue
            name = row.name if below == os.curdir or os.path.isabs(row.name) else f"{below}/{row.name}"
            first, slash, _ = os.path.normpath(name).partition("/")
            yield row._replace(name=name, split=row.split or (_split(first) if slash else None))

    return replace(metadata, format=f"imagefolder ({metadata.format})", rows=rows, home=path)


def _sidecar_rows(path: str, *, only_captioned: bool = False) -> Iterator[Row]:
    """Images below the folder, in the order of their names, with the lines of the text file beside each."""
    level: list[str] = []  # the walk gives one folder's names together, which brings an image's sidecar next to it
    folder = ""
    names = walk(path, lambda _: True, lambda name: _suffix(name) in (*IMAGE_SUFFIXES, *_SIDECARS), lambda _: None)
    for name in names:
        here = os.path.dirname(name)
        if here != folder:
            yield from _captioned(path, folder, level, only_captioned=only_captioned)
            folder, level = here, []
        level.append(os.path.basename(name))
    yield from _captioned(path, folder, level, only_captioned=only_captioned)


def _class_rows(path: str, template: str) -> Iterator[Row]:
    """Images in folders below the folder, each captioned with the name of the one it is in; folders of splits have no label."""
    for name in walk(path, lambda _: True, lambda name: _suffix(name) in IMAGE_SUFFIXES, lambda _: None):
        first, *_ = folders = name.split("/")[:-1] or [""]
        split = _split(first)
        if label := folders[-1] if len(folders) > (split is not None) else "":
            yield Row(name, (template.replace("{label}", label),), split)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _captioned(path: str, folder: str, names: list[str], *, only_captioned: bool) -> Iterator[Row]:
    present = {name for name in names if _suffix(name) in _SIDECARS}
    split = _split(folder.partition("/")[0])
    for name in names:
        if name in present:
            continue
        stem = os.path.splitext(name)[0]
        sidecar = next((stem + suffix for suffix in _SIDECARS if stem + suffix in present), None)
        if sidecar is not None:
            with lines(os.path.join(path, folder, sidecar)) as stream:
                said = [line for line in stream if line.strip()] or [""]
            yield Row(f"{folder}/{name}" if folder else name, said, split)
        elif not only_captioned:
            yield Row(f"{folder}/{name}" if folder else name, (), split)


def _nothing_known(path: str) -> CapcliError:
    files = sorted(entry.name for entry in _entries(path) if entry.is_file())
    texts = [
        name for name in files if _suffix(name) in (".txt", ".csv", ".tsv", ".json", ".jsonl", ".token", ".parquet")
    ]
    seen = f"; there is {', '.join(map(printable, texts[:5]))}: give that file itself" if texts else ""
    return CapcliError(
        f"{printable(path)} holds no annotations: looked for a dataset on disk (dataset_dict.json, state.json), "
        f"{', '.join(METADATA)} here or in train/, validation/ and the like, and images with {' or '.join(_SIDECARS)} "
        f"beside them{seen}"
    )
