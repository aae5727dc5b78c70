"""Shared by the tests of `capcli train`: painted pictures with captions, TOML files of tiny runs, forks of this process."""

from __future__ import annotations

import csv
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

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
PATIENCE = 120.0  # seconds until a forked process counts as hanging


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


def fork(function: Callable[[], object], *, stderr: int | None = None, **env: str) -> int:
    """Runs a function in a fork of this process, which needs no second import of torch; the fork's process ID.

    The fork leads its own session, its standard error is the descriptor `stderr`, and its exit code is that of SystemExit.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ |= env
        if stderr is not None:
            os.dup2(stderr, 2)
            sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        function()
        code = 0
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.stderr.flush()
        os._exit(code)


def fork_command(*arguments: object, stderr: int, **env: str) -> int:
    """Runs the `capcli` command in a fork of this process; its process ID."""

    def command() -> None:
        from capcli.cli import main

        sys.argv = ["capcli", *map(str, arguments)]
        main()

    return fork(command, stderr=stderr, **env)


def exit_code(pid: int) -> int:
    """Waits for a fork to end; its exit code, or -N for signal N. Kills a fork that hangs."""
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
