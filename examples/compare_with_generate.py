"""How fast the decode loop is beside transformers' batched `generate()`: the same random real-size model, the same images.

    python examples/compare_with_generate.py --num-beams 4 --dtype bfloat16
    python examples/compare_with_generate.py --num-beams 4 --device cuda --batch 128 --images 2048

ViT-B/16 at 224 and GPT-2 small with cross-attention, 15 tokens per caption. Each side has a process of its own and they take
turns, so that the machine's moods hit both. Prints images/s of every round, the ratio of the medians and the share of equal
captions; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

from capcli.decoding.loop import IterableFeed, Job, decode
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes, useful_slots
from capcli.models.attention import use_attention
from capcli.models.packing import keep_memory_mapped, speed_up
from capcli.models.vision_encoder_decoder import Encode, Step
from capcli.runtimes.eager import Eager

START, TOKENS, MEAN = 50256, 15, (0.5, 0.5, 0.5)
Captions = list[list[int]]


def random_captioner(dtype: str) -> Any:
    torch.manual_seed(0)
    decoder = GPT2Config(add_cross_attention=True, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), decoder)
    model = VisionEncoderDecoderModel(config).eval().to(getattr(torch, dtype))
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = START
    model.generation_config.eos_token_id = None
    return model


def pictures(count: int) -> list[Any]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(count)]


def theirs(options: argparse.Namespace) -> Callable[[], Captions]:
    """`generate()` in batches, as model cards do it but for the batch."""
    model, images = random_captioner(options.dtype).to(options.device), pictures(options.images)
    values = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5

    def run() -> Captions:
        found: Captions = []
        for batch in values.to(options.device, model.dtype).split(options.batch):
            with torch.inference_mode():
                out = model.generate(
                    pixel_values=batch, num_beams=options.num_beams, do_sample=False, max_new_tokens=TOKENS
                )
            found += out[:, 1:].tolist()
        return found

    return run


def ours(options: argparse.Namespace) -> Callable[[], Captions]:
    """The decode loop, as `capcli caption` sets it up."""
    model, device = random_captioner(options.dtype).to(options.device), torch.device(options.device)
    use_attention(model.decoder)
    encode, step = Encode(model, 1 / 255, MEAN, MEAN).to(device), Step(model)
    if device.type == "cpu":
        keep_memory_mapped()
        speed_up(encode)
        speed_up(step)
    runtime = Eager(encode.eval(), step.eval(), device)
    settings = Settings((START,), (), TOKENS, num_beams=options.num_beams)
    slots = min(useful_slots(runtime.device, settings), options.images)
    jobs = [Job(index, image) for index, image in enumerate(pictures(options.images))]

    def run() -> Captions:
        done = decode(IterableFeed(jobs), runtime, settings, Shapes.of(slots))
        return [list(d.hypotheses[0].tokens) for d in sorted(done, key=lambda d: d.tag)]

    return run


def serve(
    make: Callable[[argparse.Namespace], Callable[[], Captions]], options: argparse.Namespace, pipe: Connection
) -> None:
    """One side: captions everything, with its time, each time it is asked."""
    torch.set_num_threads(options.threads)
    run = make(options)
    run()
    while pipe.recv():
        began = time.perf_counter()
        captions = run()
        pipe.send((options.images / (time.perf_counter() - began), captions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="generate()'s batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = []
    for make in (theirs, ours):
        here, there = context.Pipe()
        context.Process(target=serve, args=(make, options, there), daemon=True).start()
        pipes.append(here)
    rates: tuple[list[float], list[float]] = ([], [])
    said: list[Captions] = [[], []]
    for number in range(options.rounds):
        for side, pipe in enumerate(pipes):
            pipe.send(True)
            rate, said[side] = pipe.recv()
            rates[side].append(rate)
        print(f"round {number + 1}: generate() {rates[0][-1]:.2f} images/s, capcli {rates[1][-1]:.2f}", flush=True)
    for pipe in pipes:
        pipe.send(False)
    medians = [statistics.median(rate) for rate in rates]
    equal = sum(a == b for a, b in zip(*said, strict=True)) / options.images
    result = {
        "num_beams": options.num_beams,
        "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu",
        "batch": options.batch,
        "threads": options.threads,
    }
    result |= {"generate": round(medians[0], 2), "capcli": round(medians[1], 2)}
    result |= {"ratio": round(medians[1] / medians[0], 2), "equal_captions": round(equal, 3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
