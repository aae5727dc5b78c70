"""Shared by the tests of `capcli train`: painted pictures with captions, TOML files of tiny runs, and processes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image
from running import environment

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
SHAPES = {"square": np.s_[6:26, 6:26], "stripe": np.s_[12:20, :], "dot": np.s_[14:19, 14:19]}
LINES = ("a {0} {1}", "there is a {0} {1} on grey", "one {1} and it is {0} as far as anybody can see from here")
ENCODER = {
    "model_type": "vit",
    "image_size": 32,
    "patch_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.1,
}
DECODER = {"model_type": "gpt2", "n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 2}  # its dropout is 0.1
BRIEF = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "evaluate_every": 3,
    "caption_images": 2,
    "log_every": 1,
    "device": "cpu",
    "threads": 1,
    "workers": 0,
}
MACHINE = "images_per_second"  # the column of history.csv that differs between two equal runs
PATIENCE = 120.0  # seconds until a process counts as hanging


def paint_data(folder: Path, count: int = 12) -> Path:
    """Pictures of coloured shapes, and a captions.txt with two captions for each, of unequal length."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image,caption"]
    for number in range(count):
        colour, shape = list(COLOURS)[number % len(COLOURS)], list(SHAPES)[number % len(SHAPES)]
        name = f"{number:02}.png"
        pixels = np.random.default_rng(number).integers(90, 130, (32, 32, 3), dtype=np.uint8)
        pixels[SHAPES[shape]] = COLOURS[colour]
        Image.fromarray(pixels).save(folder / name)
        rows += [f"{name},{LINES[(number + n) % len(LINES)].format(colour, shape)}" for n in range(2)]
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    return folder / "captions.txt"


def recipe(path: Path, data: Path, *, model: dict[str, Any] | None = None, **train: Any) -> Path:
    """A TOML file that trains a tiny captioner with dropout and a new tokenizer on `data`."""
    parts = {"tokenizer": "new", "vocab_size": 300, "max_length": 24, "encoder": ENCODER, "decoder": DECODER}
    sections = {
        "data": {"data": str(data), "val_fraction": 0.25},
        "model": parts | (model or {}),
        "train": BRIEF | train,
        "generation": {"max_new_tokens": 6},
    }
    path.write_text(tomli_w.dumps(sections))
    return path


def history(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv."""
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def comparable(folder: Path) -> list[dict[str, str]]:
    """The rows of history.csv without the column that depends on the machine."""
    return [{name: cell for name, cell in row.items() if name != MACHINE} for row in history(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def start_training(*arguments: object, stderr: int, **env: str) -> subprocess.Popen[bytes]:
    """`capcli train` as a process of its own session, without the curves, which would take most of its time."""
    script = (
        "from unittest import mock; from capcli.cli import main\n"
        "with mock.patch('capcli.training.loop.callbacks.draw_curves'): main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, "train", *map(str, arguments)],
        env=environment(**env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        start_new_session=True,
    )


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process to end; its exit code, or -N for signal N. Kills one that hangs."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()
