"""Which format a file or folder of annotations is in, by what it holds."""

from __future__ import annotations

import codecs
import os

from capcli.annotations.documents import json_file
from capcli.annotations.flickr import token_file
from capcli.annotations.folders import folder_annotations
from capcli.annotations.rows import Annotations
from capcli.annotations.tables import parquet_table, text_table
from capcli.annotations.text_files import head, lines
from capcli.errors import CapcliError, UsageError
from capcli.options import DataOptions
from capcli.text import printable

KNOWN = (
    "a table with a header (CSV, TSV, Parquet), a Flickr token file (name.jpg#0<tab>caption), COCO or Karpathy JSON, "
    "JSON lines, a folder with metadata.jsonl, one of images with .txt beside them, or a dataset saved by save_to_disk"
)
_PACKED = {
    b"\x1f\x8b": "packed with gzip",
    b"PK\x03\x04": "a zip archive",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
}


def recognise(path: str, options: DataOptions) -> list[Annotations]:
    """The annotations at `path`; several where a folder holds one for each split.

    Raises UsageError where nothing is there, and CapcliError that says what was seen where it is no known format.
    """
    if os.path.isdir(path):
        return folder_annotations(path, options, file_annotations)
    if not os.path.exists(path):
        raise UsageError(f"{printable(path)}: no such file or folder")
    if not os.path.isfile(path):
        raise UsageError(
            f"{printable(path)} is a pipe or a device, which can be read once only: save it in a file first"
        )
    return [file_annotations(path, options)]


def file_annotations(path: str, options: DataOptions) -> Annotations:
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
            f"{printable(path)} is none of the known formats. Its first line: {first[:80]!r}. Known: {KNOWN}"
        )
    return found


def _refuse_binary(path: str, beginning: bytes) -> None:
    if not beginning.strip():
        raise CapcliError(f"{printable(path)} is empty: it names no image")
    for magic, what in _PACKED.items():
        if beginning.startswith(magic):
            raise CapcliError(f"{printable(path)} is {what}: unpack it and give what comes out")
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return
    if beginning.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        raise CapcliError(f"{printable(path)} is a part of a dataset on disk: give the folder it is in")
    if b"\0" in beginning:
        line = beginning[: beginning.index(b"\0")].count(b"\n") + 1
        raise CapcliError(
            f"{printable(path)} is no annotations but binary data: line {line} holds a NUL byte. Known: {KNOWN}"
        )
