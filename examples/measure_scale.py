"""Whether time and memory per image stay constant up to a million images: the real source, loop and sink, without a model.

    python examples/measure_scale.py --count 1000000

Empty files in a thousand folders are listed, captioned by a runtime that gives one fixed token, and written to a file. The
run ends after nine tenths of them, and a second process resumes it. Prints microseconds per image and the memory of the
process as the count grows, and the time to the first new row of the second process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from capcli.captioning.backends.slots_backend import SlotsBackend
from capcli.captioning.backends.slots_plan import search_settings
from capcli.captioning.captioner import Captioner
from capcli.captioning.pipeline import CaptionRun, earlier_naming, new_run_file, wanted_entries
from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.decoding.shapes import Shapes
from capcli.loading import Loading, load
from capcli.options import CaptionOptions, GenerationOptions, SinkOptions, SourceOptions
from capcli.progress import Report
from capcli.records import Caption, Entry, Failure
from capcli.runtimes.base import EncodedChunk
from capcli.sinks import open_sink
from capcli.sources import open_source

MODEL = os.path.join(os.path.dirname(__file__), "demo-model")
FOLDERS = 1000
SLOTS = 64


class OneToken:
    """A runtime that gives every image the same token and then the end token."""

    device, lag, ahead = torch.device("cpu"), 0, False

    def __init__(self, vocabulary: int, end: int) -> None:
        self._first, self._last = (torch.zeros(SLOTS, 1, vocabulary) for _ in range(2))
        self._first[..., end - 1] = 9.0
        self._last[..., end] = 9.0

    def shapes(self, *_: Any) -> Shapes:
        return Shapes.of(SLOTS)

    def replicas(self, _: int) -> Sequence[OneToken]:
        return [self]

    def slot_bytes(self, *_: Any) -> int:
        return 1

    def allocate(self, *_: Any) -> None:
        """There is nothing to allocate."""

    def encode(self, *_: Any) -> EncodedChunk:
        return EncodedChunk((), torch.empty(0))

    def admit(self, _encoded: Any, slots: Sequence[int]) -> torch.Tensor:
        return torch.ones(len(slots), dtype=torch.bool)

    def step(self, _tokens: Any, position: torch.Tensor, _visible: Any) -> torch.Tensor:
        return torch.where((position == 0)[:, None, None], self._first, self._last)

    def repeated(self, step: Any) -> Any:
        return step


class Undecoded(SlotsBackend):
    """A backend that decodes no files."""

    def load(self, entries: Iterable[Entry], facts: Collection[str]) -> Loading:  # noqa: ARG002
        height, width = self.captioner.model.size
        blank = np.zeros((height, width, 3), np.uint8)
        return load(entries, lambda _: (blank, {}), workers=0)


class PrintingReport(Report):
    """A report that prints at every power of ten."""

    def add(self, result: Caption | Failure) -> None:
        super().add(result)
        if self.done == 1:
            self.first = self.last = time.perf_counter()
            self.last_count = 1
        if self.done >= 1000 and self.done == 10 ** (len(str(self.done)) - 1):
            self.print_line()

    def print_line(self) -> None:
        now = time.perf_counter()
        each = (now - self.last) / max(self.done - self.last_count, 1)
        print(f"{self.done:>9,} images: {each * 1e6:6.0f} us each since the last line, {memory():6.1f} MB", flush=True)
        self.last, self.last_count = now, self.done


def memory() -> float:
    """Resident megabytes of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def caption(folder: str, out: str, limit: int | None) -> None:
    began = time.perf_counter()
    loaded: Any = Captioner.load(MODEL, device="cpu", dtype="float32").core
    end = int(loaded.model.generation["eos_token_id"])
    captioner = SlotCaptioner(replace(loaded.model, runtime=OneToken(loaded.model.vocabulary, end)), loaded.files)  # type: ignore[arg-type]
    options = CaptionOptions(
        source=SourceOptions(sources=(folder,)),
        sink=SinkOptions(out=out),
        generation=GenerationOptions(num_beams=1, max_new_tokens=2),
        limit=limit,
        quiet=True,
    )
    ready = time.perf_counter()
    with open_sink(options.sink, print) as sink:
        source = open_source(options.source, print, earlier_naming(sink.run_file))
        report = PrintingReport()
        wanted = islice(wanted_entries(source, sink, report), limit)
        backend = Undecoded(options, captioner, search_settings(options, captioner), sink.run_file)
        run_file = new_run_file(options, source, backend, sink.run_file)
        CaptionRun(options, backend, sink, report, run_file).caption_all(backend.plan(wanted, source), None)
    report.print_line()
    print(f"the model took {ready - began:.1f} s; the first row came {report.first - ready:.2f} s after it", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="images, a multiple of 10,000")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # the arguments of a child process of this script
    given = parser.parse_args()
    if given.part:
        folder, out, limit = given.part
        caption(folder, out, int(limit) or None)
        return
    with tempfile.TemporaryDirectory() as place:
        folder, out = os.path.join(place, "photos"), os.path.join(place, "captions.jsonl")
        for number in range(FOLDERS):
            os.makedirs(os.path.join(folder, f"{number:04}"))
            for n in range(given.count // FOLDERS):
                open(os.path.join(folder, f"{number:04}", f"{n:06}.jpg"), "x").close()
        for limit in (given.count * 9 // 10, 0):
            command = [sys.executable, __file__, "--part", folder, out, str(limit)]
            subprocess.run(command, check=True)
        with open(out, "rb") as rows:
            print(f"{sum(1 for _ in rows):,} rows, {os.path.getsize(out) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
