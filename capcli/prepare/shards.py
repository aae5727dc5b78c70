"""The files of a shard: a log of its images while they are decoded, and the Arrow file that `datasets` reads."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any, Self

import datasets
import numpy as np
import pyarrow as pa

from capcli.errors import CapcliError
from capcli.records import Annotated, Failure, Loaded
from capcli.sources.fetching import NO_ANSWER
from capcli.storage import atomic
from capcli.text import as_text, is_text, printable, raw_bytes

ROWS, BYTES = 100, 32 << 20  # of a record batch: kept in memory, and mapped by a reader of one row


class ShardLog:
    """The results of a shard's images so far, by position; appended image by image, so that a kill loses at most one.

    Use as a context manager. Opening a log drops failures without a response, which our own network may have caused, and
    with `retry` all failures from before the retry began.
    """

    def __init__(self, path: str, *, retry: bool) -> None:
        self._retry = retry
        self._file = open(path, "a+b", opener=atomic.open_no_link)  # noqa: SIM115
        self._starts, end = _index(self._file, retry)
        self._file.truncate(end)

    def __contains__(self, position: int) -> bool:
        return position in self._starts

    def read(self, position: int, name: str) -> Loaded | Failure:
        """The result at `position`, under the name of its image."""
        self._file.seek(self._starts[position])
        values = json.loads(self._file.readline())
        if "error" in values:
            return Failure(name, values["error"], values["message"])
        return Loaded(name, np.frombuffer(self._file.read(values["bytes"]), np.uint8), values["facts"])

    def add(self, position: int, result: Loaded | Failure) -> None:
        """Appends a result. On return the operating system has the data, so a kill does not lose it."""
        content = b"" if isinstance(result, Failure) else result.pixels.tobytes()
        values: dict[str, Any] = {"position": position, "bytes": len(content), "crc32": zlib.crc32(content)}
        if isinstance(result, Failure):
            values |= {"error": result.error, "message": result.message, "again": self._retry}
        else:
            values |= {"facts": dict(result.facts)}
        self._file.write(json.dumps(values).encode() + b"\n" + content)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def logged_positions(path: str, *, retry: bool) -> frozenset[int]:
    """The positions whose results are in the log at `path`; none if there is no log."""
    try:
        with open(path, "rb") as file:
            return frozenset(_index(file, retry)[0])
    except FileNotFoundError:
        return frozenset()


def _index(file: IO[bytes], retry: bool) -> tuple[dict[int, int], int]:
    """Where the record of each position begins, and where the last whole record ends."""
    starts: dict[int, int] = {}
    end = 0
    file.seek(0)
    while line := file.readline():
        try:
            values = json.loads(line)
            content = file.read(values["bytes"])
            if len(content) < values["bytes"] or zlib.crc32(content) != values["crc32"]:
                break
            if "error" not in values or not (values["error"] in NO_ANSWER or (retry and not values["again"])):
                starts[values["position"]] = end
        except (ValueError, TypeError, KeyError):
            break
        end = file.tell()
    return starts, end


def features_of(*, odd_names: bool, tagged: bool) -> datasets.Features:
    """The columns of a copy; `odd_names` adds names that are not UTF-8 as bytes in base64, `tagged` adds the tags."""
    text, number = datasets.Value("string"), datasets.Value("int32")
    columns = {
        "file_name": text,
        "image": datasets.Image(),
        "captions": datasets.List(text),
        "width": number,
        "height": number,
    }
    more = {"tags": text} if tagged else {}
    return datasets.Features(columns | more | ({"file_name_bytes": text} if odd_names else {}))


class ShardWriter:
    """Writes the rows of one shard to an Arrow file, which is on disk after the `with` block; an error removes it.

    `rows` and `captions` count what was added.
    """

    def __init__(self, path: str, features: datasets.Features) -> None:
        self.rows = self.captions = 0
        self._path = path
        self._schema = features.arrow_schema
        self._tagged = "tags" in features
        self._batch: list[dict[str, Any]] = []
        self._bytes = 0
        self._file = open(path, "wb", opener=atomic.open_no_link)  # noqa: SIM115
        self._stream = pa.ipc.new_stream(self._file, self._schema)

    def add(self, image: Annotated, copy: Loaded) -> None:
        row: dict[str, Any] = {
            "file_name": as_text(image.name),
            "image": {"bytes": copy.pixels.tobytes(), "path": None},
            "captions": [as_text(caption) for caption in image.captions],
            "width": copy.facts["width"],
            "height": copy.facts["height"],
        }
        if self._tagged:
            row["tags"] = as_text(image.tags)
        if not is_text(image.name):
            row["file_name_bytes"] = base64.b64encode(raw_bytes(image.name)).decode("ascii")
        self._batch.append(row)
        self._bytes += copy.pixels.nbytes
        self.rows += 1
        self.captions += len(image.captions)
        if len(self._batch) == ROWS or self._bytes >= BYTES:
            self._flush()

    def _flush(self) -> None:
        self._stream.write_batch(pa.RecordBatch.from_pylist(self._batch, schema=self._schema))
        self._batch, self._bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self._batch:
                    self._flush()
                self._stream.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error is not None:
                os.unlink(self._path)


def stored_copies(path: str, images: Sequence[Annotated]) -> Iterator[Loaded]:
    """The copies of these images, which must be all the rows of the shard at `path`, in order.

    Raises CapcliError where the file cannot be read or has other rows.
    """
    try:
        with pa.OSFile(path) as file, pa.ipc.open_stream(file) as stream:
            rows = (row for batch in stream for row in batch.to_pylist())
            for image, row in zip(images, rows, strict=True):
                if row["file_name"] != as_text(image.name):
                    raise ValueError
                facts = {key: row[key] for key in ("width", "height")}
                yield Loaded(image.name, np.frombuffer(row["image"]["bytes"], np.uint8), facts)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CapcliError(f"{printable(path)} is damaged: remove it and run the same command again") from error


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, and a digest of their contents."""

    name: str
    files: Sequence[str]
    digest: str


def descriptions(splits: Iterable[str]) -> list[str]:
    """The names of the files that `describe` writes, relative to the folder."""
    return [*(f"{split}/{name}.json" for split in splits for name in ("dataset_info", "state")), "dataset_dict.json"]


def describe(out: str, splits: Sequence[SplitFiles], features: datasets.Features) -> None:
    """Writes the JSON files that make the Arrow files in `out` a DatasetDict. Raises OSError."""
    info = {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""}
    for split in splits:
        state: dict[str, Any] = {
            "_data_files": [{"filename": os.path.basename(file)} for file in split.files],
            "_fingerprint": split.digest[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split.name,
        }
        folder = os.path.join(out, split.name)
        _write_json(os.path.join(folder, "dataset_info.json"), info)
        _write_json(os.path.join(folder, "state.json"), state)
    _write_json(os.path.join(out, "dataset_dict.json"), {"splits": [split.name for split in splits]})


def _write_json(path: str, data: Any) -> None:
    atomic.replace(path, [json.dumps(data, indent=2).encode() + b"\n"])
