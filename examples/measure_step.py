"""How long a step of the decoder takes: `generate()`, capcli in PyTorch, and an ONNX engine, over the same captioner.

    capcli export --onnx --model CAPTIONER --out ENGINE
    python examples/measure_step.py CAPTIONER ENGINE --slots 16

Greedy and in float32. Each side has a process of its own and they take turns. `generate()`'s step is what its further tokens
cost: a call for many tokens less one for a single token. Ours is the mean step of the runtime over a caption, without and with
the search that follows it. Prints milliseconds and the ratios to `generate()`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from capcli.cli.model import leave_cores_to
from transformers import VisionEncoderDecoderModel

from capcli import Captioner
from capcli.decoding.search import make_search
from capcli.decoding.shapes import Shapes
from capcli.models.packing import keep_memory_mapped
from capcli.options import GenerationOptions

TOKENS = 15
Measure = Callable[[], tuple[float, float]]  # seconds of a step, without and with what picks the token


def of_generate(folder: str, slots: int) -> Measure:
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    size = model.config.encoder.image_size
    pixels = torch.randn(slots, 3, size, size, generator=torch.Generator().manual_seed(0))

    def call(tokens: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(pixels, num_beams=1, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return time.perf_counter() - began

    def measure() -> tuple[float, float]:
        step = (call(TOKENS) - call(1)) / (TOKENS - 1)
        return step, step

    return measure


def of_capcli(folder: str, slots: int) -> Measure:
    keep_memory_mapped()
    captioner = Captioner.load(folder, device="cpu", dtype="float32")
    settings = captioner.settings(GenerationOptions(num_beams=1, max_new_tokens=TOKENS, min_new_tokens=TOKENS))
    runtime = captioner.model.runtime
    images = np.random.default_rng(0).integers(0, 256, (slots, *captioner.model.size, 3), dtype=np.uint8)

    def measure() -> tuple[float, float]:
        with torch.inference_mode():
            runtime.allocate(Shapes(slots, slots), settings)
            search = make_search(settings, slots, runtime.device)
            runtime.admit(runtime.encode(images, [settings.question] * slots), range(slots))
            search.admit(list(range(slots)), [0] * slots)
            search.advance(runtime.step(*search.inputs()))
            stepping, began = 0.0, time.perf_counter()
            for _ in range(TOKENS - 1):
                inputs, before = search.inputs(), time.perf_counter()
                logits = runtime.step(*inputs)
                stepping += time.perf_counter() - before
                search.advance(logits)
            whole = time.perf_counter() - began
        return stepping / (TOKENS - 1), whole / (TOKENS - 1)

    return measure


def serve(make: Callable[[str, int], Measure], folder: str, options: argparse.Namespace, pipe: Connection) -> None:
    torch.set_num_threads(options.threads)
    measure = make(folder, options.slots)
    measure()
    while pipe.recv():
        pipe.send([seconds * 1000 for seconds in measure()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("captioner")
    parser.add_argument("engine")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    sides = {"generate()": (of_generate, options.captioner)}
    sides |= {"PyTorch": (of_capcli, options.captioner), "engine": (of_capcli, options.engine)}
    pipes, times = {}, {name: list[list[float]]() for name in sides}
    for name, (make, folder) in sides.items():
        if name == "engine":  # last: its process alone is started as the command would be
            leave_cores_to(folder)
        pipes[name], there = context.Pipe()
        context.Process(target=serve, args=(make, folder, options, there), daemon=True).start()
    for _ in range(options.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    result = {"slots": options.slots, "threads": options.threads}
    for name, each in times.items():
        for part, what in enumerate(("step", "step and search")):
            mine, theirs = ([pair[part] for pair in side] for side in (each, times["generate()"]))
            share = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            print(f"{name:12} {what:16} {statistics.median(mine):8.1f} ms   {share:.0%} of generate()'s")
            result[f"{name}, {what}"] = round(share, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
