"""Addresses of images, as one text each, and images in datasets on disk, read by row from memory-mapped files."""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from capcli.errors import CapcliError, ImageError
from capcli.pixels.opening import open_regular
from capcli.records import Stored
from capcli.text import printable


def address_of(image: str | Stored | ImageError) -> str:
    """Where an image is, as one text for `StoredImages.find`.

    A path is its own address. A row of a dataset on disk, or the reason why there is no image, is JSON after a NUL,
    which no path contains.
    """
    if isinstance(image, str):
        return image
    if isinstance(image, Stored):
        return "\0" + json.dumps([image.folder, image.row, image.column])
    return "\0" + json.dumps({"error": image.kind, "message": str(image)})


class StoredImages:
    """Reads images of `datasets` datasets on disk: the bytes in a row, or those of the file that the row names.

    A dataset is mapped into memory at its first use. Pickling leaves the maps out, so an object may be passed to forked
    and spawned processes, each of which opens what it reads. The only cache is the system's page cache.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], _Column] = {}

    def find(self, address: str) -> str | bytes:
        """The path, or the bytes of the dataset row, that `address_of` encoded.

        Raises ImageError where the address is an error, and what `read` raises.
        """
        if not address.startswith("\0"):
            return address
        try:
            place = json.loads(address[1:])
        except ValueError:  # a name in annotations may begin with NUL too
            place = None
        match place:
            case [str(folder), int(row), str(column)]:
                return self.read(Stored(folder, row, column))
            case {"error": str(kind), "message": str(message)}:
                raise ImageError(kind, message)
        raise ImageError("missing", "there is no such file: its path begins with NUL")

    def read(self, stored: Stored) -> bytes:
        """The bytes of the image's file.

        Raises:
            ImageError: no such row, no image in it, or the file that it names cannot be opened.
            CapcliError: the folder is not a dataset that can be read, or has no such column.
        """
        column = self._columns.get((stored.folder, stored.column))
        if column is None:
            column = _open_column(stored.folder, stored.column)
            self._columns[stored.folder, stored.column] = column
        return _file_bytes(column.value(stored.row))

    def __getstate__(self) -> dict[str, Any]:
        return {"_columns": {}}


@dataclass(frozen=True)
class StoredDecode:
    """`decode`, which takes a path or the bytes of a file, for the addresses of `address_of`.

    With `prompts` it also takes the prompt of the image's entry, or None.
    """

    decode: Callable[..., Any]
    prompts: bool = False
    _images: StoredImages = field(default_factory=StoredImages)

    def __call__(self, address: str, prompt: str | None = None) -> Any:
        image = self._images.find(address)
        return self.decode(image, prompt) if self.prompts else self.decode(image)


def stored_columns(folder: str, names: Collection[str]) -> Iterator[dict[str, Any]]:
    """The cells of those of these columns that the dataset in `folder` has, row by row. Raises CapcliError."""
    arrow = _arrow()
    for path in _state(folder)[0]:
        try:
            reader = open_arrow(path)
            present = [name for name in names if name in reader.schema.names]
            batches = reader.read_all().select(present).to_batches()
        except (OSError, arrow.ArrowException) as error:
            raise _unreadable(folder, error) from error
        for batch in batches:
            yield from batch.to_pylist()


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of a dataset on disk, in chunks; `indices`, if any, maps rows of the dataset to rows on disk."""

    chunks: Sequence[Any]
    ends: Sequence[int]  # the number of rows up to the end of each chunk
    indices: _Column | None

    def value(self, row: int) -> Any:
        """The value in a row. Raises ImageError where there is no such row."""
        if self.indices is not None:
            row = self.indices.value(row)
        at = bisect_right(self.ends, row)
        if row < 0 or at == len(self.chunks):
            raise ImageError("missing", f"the dataset has no row {row}")
        chunk = self.chunks[at]
        return chunk[row - self.ends[at] + len(chunk)].as_py()


def _file_bytes(value: Any) -> bytes:
    """The image in a cell: {"bytes", "path"}, as the Image feature stores it, or either of them alone."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ImageError("missing", "the dataset has no image in this row")
    if "://" in value:
        raise ImageError("missing", f"the dataset has an address in place of an image: {printable(value)}")
    with open_regular(value) as stream:
        return stream.read()


def _open_column(folder: str, name: str) -> _Column:
    files, indices = _state(folder)
    return _mapped(folder, files, name, _mapped(folder, indices, "indices", None) if indices else None)


def _state(folder: str) -> tuple[list[str], list[str]]:
    """The Arrow files of a dataset, and those with the order of its rows. Raises CapcliError."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        files = [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
        return files, [os.path.join(folder, entry["filename"]) for entry in state.get("_indices_files") or ()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(folder, error) from error


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise CapcliError(f"datasets on disk need pyarrow ({error}): pip install 'capcli[train]'") from error
    return pyarrow


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
    """One column of an Arrow file, memory-mapped; other columns are not read."""
    import pyarrow as pa

    position = open_arrow(path).schema.get_field_index(name)
    if position < 0:
        raise KeyError(name)
    only = pa.ipc.IpcReadOptions(included_fields=[position], use_threads=False)
    return open_arrow(path, only).read_all().column(0)


def open_arrow(path: str, options: Any = None) -> Any:
    """A pyarrow reader of a memory-mapped Arrow file, in the file or the stream format. Raises OSError, ArrowException."""
    import pyarrow as pa

    source = pa.memory_map(path)
    reader = pa.ipc.open_file if source.read(6) == b"ARROW1" else pa.ipc.open_stream
    source.seek(0)
    return reader(source, options=options)


def _unreadable(folder: str, error: Exception) -> CapcliError:
    what = " ".join(str(error).split()) or type(error).__name__
    return CapcliError(f"{printable(folder)} is not a dataset on disk that can be read: {what}")
