"""The time of each stage of captioning, measured one after another in this process over the same photos."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from capcli import pixels
from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.decoding.activity import Activity
from capcli.decoding.loop import Batch, Finished, IterableFeed, Job
from capcli.decoding.settings import Settings
from capcli.errors import CapcliError, ImageError
from capcli.options import MAX_PIXELS, SinkOptions, SourceOptions
from capcli.records import Entry, Loaded
from capcli.sinks import open_sink
from capcli.sources import open_source
from capcli.storage.run_file import RunFile

START_UP = "import capcli.captioning.pipeline"


@dataclass(slots=True)
class Stages:
    """Seconds by stage: `once` per run, and for `each` image; and the mean number of `tokens` of a caption."""

    once: dict[str, float] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    slots: int = 0

    @contextmanager
    def timed(self, name: str, images: int, device: torch.device | None = None) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.each[name] = self.each.get(name, 0.0) + (time.perf_counter() - began) / images


def start_up() -> float:
    """Seconds until a new interpreter has imported everything that captioning needs."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", START_UP], check=True, capture_output=True)
    return time.perf_counter() - began


def measure(captioner: SlotCaptioner, settings: Settings, photos: Sequence[str], batch_size: int | None) -> Stages:
    """Raises CapcliError where none of the photos can be captioned."""
    stages = Stages()
    entries = _listed(stages, photos)
    loaded = _loaded(stages, entries, captioner)
    done = _decoded(stages, captioner, settings, loaded, batch_size)
    _written(stages, captioner, settings, entries, loaded, done)
    return stages


def _listed(stages: Stages, photos: Sequence[str]) -> list[Entry]:
    with stages.timed("list", len(photos)):
        return list(open_source(SourceOptions(sources=tuple(photos)), lambda _: None, None))


def _loaded(stages: Stages, entries: Sequence[Entry], captioner: SlotCaptioner) -> list[Loaded]:
    found, count, spec = [], len(entries), captioner.model.spec
    for entry in entries:
        try:
            with stages.timed("read", count), open(entry.path, "rb") as file:
                data = file.read()
            with stages.timed("decode", count):
                image, _ = pixels.read(data, max_pixels=MAX_PIXELS)
            with stages.timed("resize", count):
                resized = pixels.resize(image, spec)
        except (ImageError, OSError):
            continue
        found.append(Loaded(entry.name, resized))
    if not found:
        raise CapcliError("none of the photos can be captioned")
    return found


def _decoded(
    stages: Stages, captioner: SlotCaptioner, settings: Settings, loaded: Sequence[Loaded], batch_size: int | None
) -> list[Finished]:
    """The decode loop, with each of its parts timed; it runs twice, the first time as a warm-up."""
    runtime, count = captioner.model.runtime, len(loaded)
    shapes = captioner.shapes(settings, count, batch_size)
    jobs = [Job(index, each.pixels) for index, each in enumerate(loaded)]
    done: list[Finished] = []
    for _ in range(2):
        stages.each = {
            name: value for name, value in stages.each.items() if name not in ("copy", "encode", "step", "search")
        }
        runtime.allocate(shapes, settings)
        timed, activity = TimedRuntime(runtime, stages, count), Activity().loop(settings.max_new_tokens)
        batch = Batch(IterableFeed(jobs), timed, settings, shapes, deque(), activity)
        began = time.perf_counter()
        done = [each for ended in batch.captions() for each in ended]
        total = (time.perf_counter() - began) / count
        stages.each["search"] = total - sum(stages.each[name] for name in ("copy", "encode", "step"))
    stages.slots = shapes.slots
    lengths = [len(each.hypotheses[0].tokens) for each in done if each.hypotheses]
    stages.tokens = sum(lengths) / max(len(lengths), 1)
    return done


class TimedRuntime:
    """A runtime whose calls are timed, one at a time."""

    def __init__(self, runtime: Any, stages: Stages, images: int) -> None:
        self.device, self.lag, self.ahead = runtime.device, 0, False
        self._runtime, self._stages, self._images = runtime, stages, images

    def allocate(self, *_: Any) -> None:
        """Do nothing: `_decoded` has allocated the buffers."""

    def fewer(self, shapes: Any, _: Any) -> Any:
        return shapes

    def encode(self, images: Any, encoder_ids: Any) -> Any:
        with self._stages.timed("copy", self._images, self.device):
            torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        with self._stages.timed("encode", self._images, self.device):
            return self._runtime.encode(images, encoder_ids)

    def admit(self, encoded: Any, seats: Sequence[int]) -> torch.Tensor:
        with self._stages.timed("encode", self._images, self.device):
            finite: torch.Tensor = self._runtime.admit(encoded, seats)
        return finite

    def step(self, *given: torch.Tensor) -> torch.Tensor:
        with self._stages.timed("step", self._images, self.device):
            logits: torch.Tensor = self._runtime.step(*given)
        return logits

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        return step


def _written(
    stages: Stages,
    captioner: SlotCaptioner,
    settings: Settings,
    entries: Sequence[Entry],
    loaded: Sequence[Loaded],
    done: Sequence[Finished],
) -> None:
    count, named = len(loaded), {entry.name: entry for entry in entries}
    with stages.timed("text", count):
        results = [(loaded[each.tag].name, captioner.result(loaded[each.tag], each, settings)) for each in done]
    with tempfile.TemporaryDirectory() as folder:
        out = SinkOptions(out=os.path.join(folder, "captions.jsonl"))
        with open_sink(out, lambda _: None) as sink:
            sink.begin(RunFile({}))
            with stages.timed("write", count):
                for name, result in results:
                    sink.write(named[name], result)
