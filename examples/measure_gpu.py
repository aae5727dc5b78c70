"""The speed of one GPU: the decode loop alone, and from files to rows, both beside transformers' batched `generate()`.

    python examples/measure_gpu.py

ViT-B/16 and GPT-2 small with random weights in bfloat16, 15 tokens, greedy and with 4 beams. For the loop alone the images are
in memory, and each side runs in a process of its own, in turns. Files are generated JPEGs of 640x480, captioned by
`capcli bench`. Nothing is downloaded. Takes a few minutes; prints a table, and last a line of JSON with all measurements.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BEAMS = (1, 4)
TOKENS = 15
END = 50_256  # GPT-2's token for the beginning and the end
WIDTH, HEIGHT = 640, 480
MEAN = (0.5, 0.5, 0.5)
Captions = list[list[int]]


def random_captioner() -> Any:
    import torch
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

    torch.manual_seed(0)
    decoder = GPT2Config(add_cross_attention=True, is_decoder=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(), decoder)
    model = VisionEncoderDecoderModel(config).eval().to(torch.bfloat16)
    model.generation_config.decoder_start_token_id = model.generation_config.pad_token_id = END
    model.generation_config.eos_token_id = None
    return model


def save_captioner(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

    model = random_captioner()
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(END + 1)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END}", pad_token=f"w{END}").save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def draw(folder: Path, number: int) -> None:
    """A JPEG that takes as long to decode as a photo: smooth shapes and noise, about 90 kB."""
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (WIDTH, HEIGHT), Image.BICUBIC
    )
    noisy = np.asarray(shapes, np.float32) + random.normal(0, 8, (HEIGHT, WIDTH, 1))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=88)


def images_in_memory(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (224, 224, 3), dtype=np.uint8) for _ in range(count)]


def generate_side(options: argparse.Namespace, num_beams: int) -> Callable[[], Captions]:
    """`generate()` in batches."""
    import torch

    model, images = random_captioner().to(options.device), images_in_memory(options.images)
    values = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5

    def caption() -> Captions:
        found: Captions = []
        for batch in values.to(options.device, model.dtype).split(options.batch):
            with torch.inference_mode():
                ids = model.generate(pixel_values=batch, num_beams=num_beams, do_sample=False, max_new_tokens=TOKENS)
            found += ids[:, 1:].tolist()
        return found

    return caption


def capcli_side(options: argparse.Namespace, num_beams: int) -> Callable[[], Captions]:
    """The decode loop, configured as `capcli caption` does."""
    import torch

    from capcli.decoding.loop import IterableFeed, Job, decode
    from capcli.decoding.settings import Settings
    from capcli.decoding.shapes import Shapes, useful_slots
    from capcli.models.attention import use_attention
    from capcli.models.packing import keep_memory_mapped, speed_up
    from capcli.models.vision_encoder_decoder import Encode, Step
    from capcli.runtimes.eager import Eager

    model, device = random_captioner().to(options.device), torch.device(options.device)
    use_attention(model.decoder)
    encode, step = Encode(model, 1 / 255, MEAN, MEAN).to(device), Step(model)
    if device.type == "cpu":
        keep_memory_mapped()
        speed_up(encode)
        speed_up(step)
    runtime = Eager(encode.eval(), step.eval(), device)
    settings = Settings((END,), (), TOKENS, num_beams=num_beams)
    slots = min(useful_slots(runtime.device, settings), options.images)
    jobs = [Job(index, image) for index, image in enumerate(images_in_memory(options.images))]

    def caption() -> Captions:
        finished = decode(IterableFeed(jobs), runtime, settings, Shapes.of(slots))
        return [list(each.hypotheses[0].tokens) for each in sorted(finished, key=lambda each: each.tag)]

    return caption


def serve(
    side: Callable[[argparse.Namespace, int], Callable[[], Captions]],
    options: argparse.Namespace,
    num_beams: int,
    pipe: Connection,
) -> None:
    """Caption all images at every True on the pipe; send images per second and the captions."""
    caption = side(options, num_beams)
    caption()
    while pipe.recv():
        began = time.perf_counter()
        captions = caption()
        pipe.send((options.images / (time.perf_counter() - began), captions))


def measure_loop(options: argparse.Namespace, num_beams: int) -> dict[str, float]:
    """Images per second of both sides in the median round, and the share of equal captions."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for side in (generate_side, capcli_side):
        pipe, child_pipe = context.Pipe()
        context.Process(target=serve, args=(side, options, num_beams, child_pipe), daemon=True).start()
        pipes.append(pipe)
    rates: tuple[list[float], list[float]] = ([], [])
    captions: list[Captions] = [[], []]
    for _ in range(options.rounds):
        for number, pipe in enumerate(pipes):
            pipe.send(True)
            rate, captions[number] = pipe.recv()
            rates[number].append(rate)
    for pipe in pipes:
        pipe.send(False)
    equal = sum(a == b for a, b in zip(*captions, strict=True)) / options.images
    return {"generate": statistics.median(rates[0]), "capcli": statistics.median(rates[1]), "equal_captions": equal}


def run_bench(*arguments: object) -> dict[str, Any]:
    """The JSON of `capcli bench`; the other lines go to standard error as they are printed."""
    command = [sys.executable, "-m", "capcli", "bench", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = "{}"
        for last in process.stdout:
            print(last, end="", file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    found: dict[str, Any] = json.loads(last)
    return found


def print_row(name: str, found: dict[str, Any]) -> None:
    if "contestants" in found:
        capcli, baseline = (found["contestants"][each] for each in ("capcli", "bfloat16"))
        rates = baseline["images_per_second"], capcli["images_per_second"]
        equal, ceiling = baseline["equal"], f"{found['ceiling']:.0f}"
    else:
        rates, equal, ceiling = (found["generate"], found["capcli"]), found["equal_captions"], ""
    print(f"{name:<40}{rates[0]:>12.1f}{rates[1]:>10.1f}{rates[1] / rates[0]:>7.2f}x{equal:>8.1%}{ceiling:>10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=4096, help="images in memory")
    parser.add_argument("--files", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256, help="batch size of generate(), images in memory")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        model, photos = Path(place, "captioner"), Path(place, "photos")
        save_captioner(model)
        photos.mkdir()
        with ProcessPoolExecutor() as workers:
            list(workers.map(partial(draw, photos), range(options.files), chunksize=64))
        bench = (photos, "--model", model, "--max-new-tokens", TOKENS, "--dtype", "bfloat16")
        bench += ("--device", options.device, "--rounds", options.rounds, "--num-beams")
        for num_beams in BEAMS:
            found[f"{num_beams} beams, loop alone"] = measure_loop(options, num_beams)
            found[f"{num_beams} beams, files to rows"] = run_bench(*bench, num_beams, "--against", "bfloat16")
        print(f"{'images/s':<40}{'generate()':>12}{'capcli':>10}{'ratio':>8}{'equal':>8}{'ceiling':>10}")
        for name, each in found.items():
            print_row(name, each)
        if options.device.startswith("cuda") and find_spec("torchvision"):
            name = "1 beams, files to rows, --gpu-decode"
            found[name] = run_bench(*bench, 1, "--quick", "--gpu-decode")
            capcli = found[name]["contestants"]["capcli"]
            unused = "" if capcli["gpu_decode"] else "  (not used: decoder processes are faster)"
            print(f"{name:<40}{'':>12}{capcli['images_per_second']:>10.1f}{unused}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
