"""What is done of a shard at work: a log that is appended to image by image, so that a kill costs its last record."""

from __future__ import annotations

import json
import zlib
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from capcli.records import Failure, Loaded
from capcli.sources.fetching import NO_ANSWER


class ShardLog:
    """The results of a shard's images so far, by their positions in it; to be entered.

    What got no answer is forgotten when a run goes on, for it may have been our network; what failed before all was to be
    tried `again` is, too.
    """

    def __init__(self, path: str, *, again: bool) -> None:
        self._again = again
        self._file = open(path, "a+b")  # noqa: SIM115
        self._starts, end = _index(self._file, again)
        self._file.truncate(end)

    def __contains__(self, position: int) -> bool:
        return position in self._starts

    def read(self, position: int, name: str) -> Loaded | Failure:
        self._file.seek(self._starts[position])
        values = json.loads(self._file.readline())
        if "error" in values:
            return Failure(name, values["error"], values["message"])
        return Loaded(name, np.frombuffer(self._file.read(values["bytes"]), np.uint8), values["facts"])

    def add(self, position: int, result: Loaded | Failure) -> None:
        """Append a result: out of this process when it returns, so that the process may be killed."""
        content = b"" if isinstance(result, Failure) else result.pixels.tobytes()
        values: dict[str, Any] = {"position": position, "bytes": len(content), "crc32": zlib.crc32(content)}
        if isinstance(result, Failure):
            values |= {"error": result.error, "message": result.message, "again": self._again}
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


def begun(path: str, *, again: bool) -> frozenset[int]:
    """The positions whose results the log at `path` holds; none where there is no log."""
    try:
        with open(path, "rb") as file:
            return frozenset(_index(file, again)[0])
    except FileNotFoundError:
        return frozenset()


def _index(file: IO[bytes], again: bool) -> tuple[dict[int, int], int]:
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
            if "error" not in values or not (values["error"] in NO_ANSWER or (again and not values["again"])):
                starts[values["position"]] = end
        except (ValueError, TypeError, KeyError):
            break
        end = file.tell()
    return starts, end
