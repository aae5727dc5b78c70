"""What one GPU gives: the decode loop alone, and files in, rows out, both beside batched `generate()`, in a few minutes.

    python examples/measure_gpu.py

ViT-B/16 and GPT-2 small with random weights in bfloat16, 15 tokens, greedy and with 4 beams. The loop alone captions images that
are in memory (compare_with_generate.py). Files are JPEGs of 640x480, drawn first; `capcli bench` says where their time goes.
Nothing is fetched. Prints a table; the last line is JSON with all that was measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
BEAMS = (1, 4)
LAST = 50_256  # GPT-2's token of the beginning and the end
WIDTH, HEIGHT = 640, 480


def save_captioner(folder: Path) -> None:
    """Random weights at real size, and a word for every token."""
    from compare_with_generate import START, random_captioner
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

    assert START == LAST
    model = random_captioner("bfloat16")
    model.generation_config.eos_token_id = LAST
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(LAST + 1)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{LAST}", pad_token=f"w{LAST}").save_pretrained(folder)
    ViTImageProcessorPil().save_pretrained(folder)


def draw(folder: Path, number: int) -> None:
    """A photo as far as a decoder is concerned: smooth shapes and noise, some 90 kB."""
    draw = np.random.default_rng(number)
    shapes = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    noisy = np.asarray(shapes, np.float32) + draw.normal(0, 8, (HEIGHT, WIDTH, 1))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05}.jpg", quality=88)


def told(*command: object) -> dict[str, Any]:
    """What a command says in its last line, of JSON. Its own words go to standard error as they come."""
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = "{}"
        for last in process.stdout:
            print(last, end="", file=sys.stderr, flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    found: dict[str, Any] = json.loads(last)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=4096, help="images in memory")
    parser.add_argument("--files", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=256, help="generate()'s batch, images in memory")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        model, photos = Path(place, "captioner"), Path(place, "photos")
        save_captioner(model)
        photos.mkdir()
        with ProcessPoolExecutor() as workers:
            list(workers.map(partial(draw, photos), range(given.files), chunksize=64))
        bench = ("-m", "capcli", "bench", photos, "--model", model, "--max-new-tokens", 15, "--dtype", "bfloat16")
        loop = (HERE / "compare_with_generate.py", "--images", given.images, "--batch", given.batch)
        same = ("--device", given.device, "--rounds", given.rounds, "--num-beams")
        for beams in BEAMS:
            alone = told(*loop, *same, beams)
            files = told(*bench, *same, beams, "--against", "bfloat16")
            found |= {f"{beams} beams, loop alone": alone, f"{beams} beams, files to rows": files}
        print(f"{'images/s':<40}{'generate()':>12}{'capcli':>10}{'ratio':>8}{'equal':>8}{'ceiling':>10}")
        for name, each in found.items():
            line(name, each)
        if given.device.startswith("cuda") and find_spec("torchvision"):
            decoded = told(*bench, *same, 1, "--quick", "--gpu-decode")
            found["1 beams, files to rows, --gpu-decode"] = decoded
            ours = decoded["contestants"]["capcli"]
            used = "" if ours["gpu_decode"] else "  (not used: processes are quicker)"
            print(f"{'1 beams, files to rows, --gpu-decode':<40}{'':>12}{ours['images_per_second']:>10.1f}{used}")
    print(json.dumps(found))


def line(name: str, found: dict[str, Any]) -> None:
    if "contestants" in found:
        ours, peer = (found["contestants"][each] for each in ("capcli", "bfloat16"))
        rates, equal, ceiling = (peer["images_per_second"], ours["images_per_second"]), peer["equal"], found["ceiling"]
    else:
        rates, equal, ceiling = (found["generate"], found["capcli"]), found["equal_captions"], None
    shown = "" if ceiling is None else f"{ceiling:.0f}"
    print(f"{name:<40}{rates[0]:>12.1f}{rates[1]:>10.1f}{rates[1] / rates[0]:>7.2f}x{equal:>8.1%}{shown:>10}")


if __name__ == "__main__":
    main()
