"""Arrow files of images and captions, as `datasets` writes them, and the files it wants beside them."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import datasets
import numpy as np
import pyarrow as pa

from capcli.errors import CapcliError
from capcli.records import Annotated, Loaded
from capcli.storage import atomic
from capcli.text import as_text, is_text, printable, raw_bytes

ROWS, BYTES = 100, 32 << 20  # of a record batch: what is held in memory, and what a reader of one row looks up


def features_of(*, odd_names: bool, tagged: bool) -> datasets.Features:
    """The columns of a copy; `odd_names` adds the bytes of names that are not UTF-8, in base64, `tagged` the tags."""
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
    """Writes one shard's rows as they come; `rows` and `captions` count them. Left by an error, the file is removed."""

    def __init__(self, path: str, features: datasets.Features) -> None:
        self.rows = self.captions = 0
        self._path = path
        self._schema = features.arrow_schema
        self._tagged = "tags" in features
        self._held: list[dict[str, Any]] = []
        self._bytes = 0
        self._file = open(path, "wb")  # noqa: SIM115
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
        self._held.append(row)
        self._bytes += copy.pixels.nbytes
        self.rows += 1
        self.captions += len(image.captions)
        if len(self._held) == ROWS or self._bytes >= BYTES:
            self._flush()

    def _flush(self) -> None:
        self._stream.write_batch(pa.RecordBatch.from_pylist(self._held, schema=self._schema))
        self._held, self._bytes = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self._held:
                    self._flush()
                self._stream.close()
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
            if error is not None:
                os.unlink(self._path)


def stored_copies(path: str, images: Sequence[Annotated]) -> Iterator[Loaded]:
    """The copies of these images, which are all that the shard at `path` holds, in their order.

    Raises CapcliError where it holds anything else.
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
        raise CapcliError(f"{printable(path)} is damaged: remove it, and the same command makes it anew") from error


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split, and a digest of their contents."""

    name: str
    files: Sequence[str]
    digest: str


def describe(out: str, splits: Sequence[SplitFiles], features: datasets.Features) -> None:
    """Write what makes a DatasetDict of the Arrow files in `out`."""
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
        write_json(os.path.join(folder, "dataset_info.json"), info)
        write_json(os.path.join(folder, "state.json"), state)
    write_json(os.path.join(out, "dataset_dict.json"), {"splits": [split.name for split in splits]})


def write_json(path: str, data: Any) -> None:
    """Whole or not at all; raises OSError."""
    atomic.replace(path, [json.dumps(data, indent=2).encode() + b"\n"])
