"""What the sink tests share: a run over names that needs no captioner."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capcli.options import SinkOptions
from capcli.records import Candidate, Caption, Entry, Failure
from capcli.sinks import Sink, open_sink
from capcli.storage.run_file import RunFile

AHEAD = 3  # entries taken from the source before the first of them is written, as in the pipeline


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A temporary folder, in memory where possible: thousands of renames on a disk take ten times as long."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def caption_of(name: str, text: str = "a picture of {}", count: int = 1, **facts: str | int) -> Caption:
    filled = text.format(name.encode("utf-8", "replace").decode())
    return Caption(name, tuple(Candidate(f"{filled}{' again' * n}", -0.25 - n) for n in range(count)), facts)


def run(
    names: Iterable[str],
    options: SinkOptions,
    *,
    caption: Callable[[str], Caption | Failure] = caption_of,
    data: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    folder: Path | None = None,
) -> Sink:
    """Caption those of `names` that the sink wants; `data` is the run file's, `folder` contains the images."""
    sink = open_sink(options, [].append if warnings is None else warnings.append)
    with sink:
        sink.begin(RunFile(data or {"state": "running"}))
        waiting: list[Entry] = []
        for name in names:
            entry = Entry(name, str(folder / name) if folder else name)
            if (wanted := sink.wanted(entry)) is not None:
                waiting.append(wanted)
            if len(waiting) == AHEAD:
                first = waiting.pop(0)
                sink.write(first, first.failure or caption(first.name))
        for entry in waiting:
            sink.write(entry, entry.failure or caption(entry.name))
        sink.settle()
        sink.write_run_file(RunFile({**(data or {}), "state": "finished"}))
    return sink


def rows(path: Path) -> list[dict[str, Any]]:
    """The complete JSON lines of a file; a torn last line is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
