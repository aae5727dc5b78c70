"""Images inside datasets on disk, by their row: mapped into memory, opened when they are first asked for."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from capcli.errors import CapcliError, ImageError
from capcli.pixels.opening import open_regular
from capcli.records import Stored
from capcli.text import printable


class StoredImages:
    """Reads images that a `datasets` dataset on disk holds: the bytes of their files, or of the files that it names.

    Each process opens what it reads, and only that; nothing of it is pickled, so that an object may be handed to
    processes that are forked or spawned. The system's page cache is all that holds what was read.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], _Column] = {}

    def read(self, stored: Stored) -> bytes:
        """The bytes of the image's file.

        Raises:
            ImageError: missing (no such row, or nothing in it), or what opening the file that it names raises.
            CapcliError: the folder holds no dataset that can be read, or not that column.
        """
        column = self._columns.get((stored.folder, stored.column))
        if column is None:
            column = _open_column(stored.folder, stored.column)
            self._columns[stored.folder, stored.column] = column
        return _file_bytes(column.value(stored.row))

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": {}}


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of a dataset as it lies on disk, in chunks; `indices` says which row is where, if not in order."""

    chunks: Sequence[Any]
    ends: Sequence[int]  # the rows up to the end of each chunk
    indices: _Column | None

    def value(self, row: int) -> Any:
        """The value in a row; ImageError where there is no such row."""
        if self.indices is not None:
            row = self.indices.value(row)
        at = bisect_right(self.ends, row)
        if row < 0 or at == len(self.chunks):
            raise ImageError("missing", f"the dataset has no row {row}")
        chunk = self.chunks[at]
        return chunk[row - self.ends[at] + len(chunk)].as_py()


def _file_bytes(value: Any) -> bytes:
    """An Image feature's value is {"bytes", "path"}; other columns hold the bytes or the path alone."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ImageError("missing", "the dataset holds no image in this row")
    if "://" in value:
        raise ImageError("missing", f"the dataset names an address instead of an image: {printable(value)}")
    with open_regular(value) as stream:
        return stream.read()


def _open_column(folder: str, name: str) -> _Column:
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        files = [os.path.join(folder, each["filename"]) for each in state["_data_files"]]
        orders = [os.path.join(folder, each["filename"]) for each in state.get("_indices_files") or ()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error
    return _mapped(folder, files, name, _mapped(folder, orders, "indices", None) if orders else None)


def _mapped(folder: str, files: Sequence[str], name: str, indices: _Column | None) -> _Column:
    import pyarrow as pa

    chunks: list[Any] = []
    for path in files:
        try:
            chunks += [chunk for chunk in _column_of(path, name).chunks if len(chunk)]
        except KeyError:
            raise CapcliError(f"the dataset in {printable(folder)} has no column {name!r}") from None
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(folder, error) from error
    return _Column(chunks, list(accumulate(map(len, chunks))), indices)


def _column_of(path: str, name: str) -> Any:
    """One column of an Arrow file, mapped and not read; other columns are not even looked at."""
    import pyarrow as pa

    source = pa.memory_map(path)
    kind = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
    source.seek(0)
    position = kind(source).schema.get_field_index(name)
    if position < 0:
        raise KeyError(name)
    source.seek(0)
    reader = kind(source, options=pa.ipc.IpcReadOptions(included_fields=[position], use_threads=False))
    return reader.read_all().column(0)


def _unreadable(folder: str, error: Exception) -> CapcliError:
    what = " ".join(str(error).split()) or type(error).__name__
    return CapcliError(f"{printable(folder)} is no dataset on disk that can be read: {what}")
