"""The baselines: transformers and Optimum as an efficient script uses them. `python baselines.py` reads a task.

A DataLoader's worker processes read the images, and `generate()` captions them in batches of the fastest size.

This file runs without capcli, in the Python that --peer-python names; only captioners of capcli's own architectures need
capcli, which registers them with transformers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

BATCHES = {"cpu": (8, 16, 32, 64), "cuda": (32, 64, 128, 256, 512)}  # batch sizes to try, by device type
TRIED = 2  # batches of each size that are timed


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 4


class Photos(Dataset[Any]):
    """Photos as the image processor returns them."""

    def __init__(self, files: list[str], processor: Any) -> None:
        self.files, self.processor = files, processor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return self.processor(upright, return_tensors="pt").pixel_values[0]


def loader_of(folder: str) -> Any:
    """The class that loads a captioner."""
    name = json.loads((Path(folder) / "config.json").read_text("utf-8"))["architectures"][0]
    if hasattr(transformers, name):
        return getattr(transformers, name)
    import capcli

    capcli.register()
    return transformers.AutoModel


class Baseline:
    """A captioner run by `generate()`, as the task's `how` specifies."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        folder, how = task["model"], task["how"]
        self.dtype = torch.bfloat16 if how in ("bfloat16", "compiled") else torch.float32
        if how == "optimum":
            from optimum.onnxruntime import ORTModelForVision2Seq

            self.model: Any = ORTModelForVision2Seq.from_pretrained(folder, export=True)
            self.device = torch.device("cpu")
        else:
            self.model = loader_of(folder).from_pretrained(folder, dtype=self.dtype).eval()
            self.device = torch.device(task["device"])
            self.model.to(self.device)
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        load: Any = transformers.AutoImageProcessor.from_pretrained
        self.photos = Photos(task["files"], load(folder))
        self.settings = {name: value for name, value in task["generation"].items() if value is not None}
        if how == "compiled":
            self.settings["cache_implementation"] = "static"
            self.model.forward = torch.compile(self.model.forward)

    def run(self, batch_size: int, count: int | None = None) -> tuple[float, dict[str, str]]:
        """Seconds for the first `count` photos (None: all), and the captions by path."""
        began = time.perf_counter()
        files = self.task["files"][:count]
        photos = torch.utils.data.Subset(self.photos, range(len(files)))
        on_gpu = self.device.type == "cuda"
        workers = min(len(files), max(2, min(32, usable_cpus() - 2)) if on_gpu else 2)
        loader = DataLoader(photos, batch_size, num_workers=workers, pin_memory=on_gpu)
        captions: list[str] = []
        with torch.inference_mode():
            for pixels in loader:
                ids = self.model.generate(
                    pixel_values=pixels.to(self.device, self.dtype, non_blocking=True), **self.settings
                )
                captions += [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return time.perf_counter() - began, dict(zip(files, captions, strict=True))

    def best_batch(self) -> int:
        """The fastest of BATCHES for which there are enough photos, each timed after a warm-up."""
        if self.task["how"] == "single":
            return 1
        count = len(self.task["files"])
        sizes = [size for size in BATCHES[self.device.type] if size <= count] or [count]
        rates = {}
        for size in sizes:
            timed = min(count, TRIED * size)
            try:
                self.run(size, size)
                rates[size] = timed / self.run(size, timed)[0]
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                if not rates:
                    raise
                break
        return max(rates, key=lambda size: rates[size])


def main(task: dict[str, Any]) -> None:
    quiet: Any = transformers.logging.set_verbosity_error
    quiet()
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            baseline = Baseline(task)
        except ModuleNotFoundError as error:
            sys.exit(f"{error.name} is missing: give a Python that has it with --peer-python")
        load = time.perf_counter() - began
        batch_size = baseline.best_batch()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    facts = {"load": load, "dtype": str(baseline.dtype).removeprefix("torch."), "batch_size": batch_size, **versions}
    print(json.dumps(facts), flush=True)
    while sys.stdin.readline().strip() == "go":
        with contextlib.redirect_stdout(sys.stderr):
            seconds, captions = baseline.run(batch_size)
        print(json.dumps({"seconds": seconds, "captions": captions}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
