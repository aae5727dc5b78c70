"""capcli as a process of `capcli bench`: `python -m capcli.bench.capcli_process`.

The first line of standard input is the job as JSON: `files`, and the options of `capcli caption` (see `options_of`). It is
answered by a line of JSON once the model is loaded and warm, and each line `go` by another after all files are captioned.
Any other line ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from capcli.captioning.backends.slots_backend import SlotsBackend
from capcli.captioning.pipeline import CaptionRun, wanted_entries
from capcli.options import CaptionOptions, GenerationOptions, SinkOptions, SourceOptions
from capcli.progress import Report
from capcli.sinks import open_sink
from capcli.sources import open_source
from capcli.storage.run_file import RunFile


def options_of(task: dict[str, Any], out: str) -> CaptionOptions:
    """The options of the equivalent `capcli caption`."""
    return CaptionOptions(
        source=SourceOptions(sources=tuple(task["files"])),
        sink=SinkOptions(out=out, overwrite=True),
        generation=GenerationOptions(**task["generation"]),
        model=task["model"],
        device=task["device"],
        dtype=task["dtype"],
        batch_size=task["batch_size"],
        threads=task["threads"],
        gpu_decode=task["gpu_decode"],
        quiet=True,
    )


def main(task: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "captions.jsonl")
        options = options_of(task, out)
        began = time.perf_counter()
        backend = SlotsBackend.open(options, None)
        load = time.perf_counter() - began
        _, slots = caption(backend)  # warm-up
        dtype = backend.captioner.model.dtype
        answer({"load": load, "dtype": dtype, "batch_size": slots, "gpu_decode": backend.options.gpu_decode})
        while sys.stdin.readline().strip() == "go":
            seconds, _ = caption(backend)
            rows = map(json.loads, Path(out).read_text("utf-8").splitlines())
            answer({"seconds": seconds, "captions": {row["file_name"]: row["text"] for row in rows}})


def answer(fields: dict[str, Any]) -> None:
    print(json.dumps(fields), flush=True)


def caption(backend: SlotsBackend) -> tuple[float, int]:
    """Seconds from listing the first file to writing the last row, and the number of slots."""
    began, options = time.perf_counter(), backend.options
    with open_sink(options.sink, lambda _: None) as sink:
        source = open_source(options.source, lambda _: None, None)
        report = Report()
        wanted = backend.plan(wanted_entries(source, sink, report), source)
        CaptionRun(options, backend, sink, report, RunFile({})).caption_all(wanted, None)
    return time.perf_counter() - began, backend.batch_size


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
