"""A run over names that needs no captioner: what the sink tests share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from capcli.options import SinkOptions
from capcli.records import Candidate, Caption, Entry, Failure
from capcli.sinks import Sink, open_sink

AHEAD = 3  # entries asked for before the first of them is written, as a pipeline does


def caption_of(name: str, text: str = "a picture of {}", count: int = 1, **facts: str | int) -> Caption:
    shown = text.format(name.encode("utf-8", "replace").decode())
    return Caption(name, tuple(Candidate(f"{shown}{' again' * n}", -0.25 - n) for n in range(count)), facts)


def run(
    names: Iterable[str],
    options: SinkOptions,
    *,
    caption: Callable[[str], Caption | Failure] = caption_of,
    data: dict[str, Any] | None = None,
    warnings: list[str] | None = None,
    folder: Path | None = None,
) -> Sink:
    """Caption what the sink wants of `names`; `folder` is where their images are."""
    sink = open_sink(options, [].append if warnings is None else warnings.append)
    with sink:
        sink.begin(data or {"state": "running"})
        waiting: list[Entry] = []
        for name in names:
            entry = Entry(name, str(folder / name) if folder else name)
            if sink.wants(entry):
                waiting.append(entry)
            if len(waiting) == AHEAD:
                first = waiting.pop(0)
                sink.write(first, caption(first.name))
        for entry in waiting:
            sink.write(entry, caption(entry.name))
        sink.write_receipt({**(data or {}), "state": "finished"})
    return sink


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a torn one is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
