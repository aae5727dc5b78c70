"""Recognises the format of a file or folder of annotations; reads imagefolders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from capcli.annotations.datasets import is_dataset, stored_annotations
from capcli.annotations.image_folders import SIDECARS, captioned_folder, class_folders, split_folder
from capcli.annotations.json_files import json_file
from capcli.annotations.rows import Annotations, Row
from capcli.annotations.tables import parquet_table, text_table, token_file
from capcli.annotations.text_files import UNDECODED, decoded, head, lines
from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.sources.hidden import is_hidden
from capcli.sources.lists import UTF16_MARKS
from capcli.text import printable

KNOWN = (
    "a table with a header (CSV, TSV, Parquet), a Flickr token file (name.jpg#0<tab>caption), COCO or Karpathy JSON, "
    "JSON lines, a folder with metadata.jsonl, one of images with .txt or .json beside them, or a dataset saved by save_to_disk"
)
METADATA = tuple(f"metadata.{suffix}" for suffix in ("jsonl", "csv", "parquet"))  # Hugging Face imagefolder's
_PACKED = {
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
}


def recognise(path: str, options: DataOptions) -> list[Annotations]:
    """The annotations at `path`; several where a folder has a metadata file for each split.

    Raises UsageError where `path` does not exist or is a pipe, and CapcliError, with what was found, for an unknown format.
    """
    if os.path.isdir(path):
        return folder_annotations(path, options)
    if not os.path.exists(path):
        raise UsageError(f"{printable(path)}: no such file or folder")
    if not os.path.isfile(path):
        raise UsageError(
            f"{printable(path)} is a pipe or a device, which can be read only once: save it to a file first"
        )
    return [file_annotations(path, options)]


def file_annotations(path: str, options: DataOptions) -> Annotations:
    """The annotations in a file. Raises CapcliError, with its first line, for an unknown format."""
    beginning = head(path)
    if beginning.startswith(b"PAR1"):
        return parquet_table(path, options)
    _refuse_binary(path, beginning)
    with lines(path) as stream:
        first = next((line for line in stream if line.strip()), "").rstrip("\r\n")
    if first.lstrip().startswith(("{", "[")):
        return json_file(path, options)
    found = token_file(path, first) or text_table(path, first, options)
    if found is None:
        raise CapcliError(
            f"{printable(path)} has none of the known formats. Its first line: {first[:80]!r}. Known: {KNOWN}"
        )
    return found


def _refuse_binary(path: str, beginning: bytes) -> None:
    if not beginning.strip():
        raise CapcliError(f"{printable(path)} is empty: it lists no image")
    for magic, what in _PACKED.items():
        if beginning.startswith(magic):
            raise CapcliError(f"{printable(path)} is {what}: unpack it and give the unpacked file")
    if beginning.startswith(UTF16_MARKS):
        return
    if beginning.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise CapcliError(f"{printable(path)} is a file of a dataset on disk: give the folder it is in")
    first = beginning.lstrip().partition(b"\n")[0]
    if b"\0" in first or (b"\0" in beginning and UNDECODED.search(decoded(first))):
        line = beginning[: beginning.index(b"\0")].count(b"\n") + 1
        raise CapcliError(f"{printable(path)} is binary data: line {line} has a NUL byte. Known formats: {KNOWN}")


def folder_annotations(path: str, options: DataOptions) -> list[Annotations]:
    """The annotations in the folder at `path`.

    Raises CapcliError, with what was looked for and what the folder has instead, where there are none.
    """
    if is_dataset(path):
        return [stored_annotations(path, options)]
    metadata = [_imagefolder(path, file_annotations(file, options)) for file in _metadata(path)]
    if metadata:
        return metadata
    if options.label_template is not None:
        return [class_folders(path, options.label_template)]
    found = captioned_folder(path, whole=options.text_files == "whole")
    if found is None:
        raise _nothing_known(path)
    return [found]


def _metadata(path: str) -> list[str]:
    """The metadata files of the folder and of the splits' folders in it, at most one of each folder."""
    folders = [path, *sorted(entry.path for entry in _entries(path) if entry.is_dir() and split_folder(entry.name))]
    files = (
        next(filter(os.path.isfile, (os.path.join(folder, name) for name in METADATA)), None) for folder in folders
    )
    return [file for file in files if file is not None]


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return list(found)
    except OSError as error:
        raise CapcliError(f"{printable(path)}: {error.strerror or error}") from None


def _imagefolder(path: str, metadata: Annotations) -> Annotations:
    """The metadata with names relative to the folder at `path`, and with splits from the first folder of each name."""
    below = os.path.relpath(metadata.home or os.curdir, path or os.curdir)

    def rows() -> Iterator[Row]:
        for row in metadata.rows():
            if row.fault is not None:
                yield row
                continue
            name = row.name if below == os.curdir or os.path.isabs(row.name) else f"{below}/{row.name}"
            first, slash, _ = os.path.normpath(name).partition("/")
            yield row._replace(name=name, split=row.split or (split_folder(first) if slash else None))

    return replace(metadata, format=f"imagefolder ({metadata.format})", rows=rows, home=path)


def _nothing_known(path: str) -> CapcliError:
    files = sorted(entry.name for entry in _entries(path) if entry.is_file())
    suffixes = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".token", ".parquet")
    likely = [name for name in files if os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name)]
    hint = f"; it has {', '.join(map(printable, likely[:5]))}: give that file" if likely else ""
    return CapcliError(
        f"{printable(path)} has no annotations: looked for a dataset on disk (dataset_dict.json, state.json), "
        f"{', '.join(METADATA)} here or in train/, validation/ or similar folders, and images with {', '.join(SIDECARS[:-1])} or "
        f"{SIDECARS[-1]} beside them{hint}"
    )
