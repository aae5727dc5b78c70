"""What tests of the `capcli` command share: a tiny captioner on disk, generated pictures, and ways to run the command."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from captioners import SIZE, random_captioner
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capcli.cli import main

PATIENCE = 120.0  # seconds; a busy machine needs less for any single step
COMMAND = (sys.executable, "-m", "capcli")
VOCABULARY = 120
AWKWARD = ["a,comma", '"quoted"', "semi;colon", "новый", "café", "日本", "'single'", "back\\slash"]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": SIZE, "width": SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def save_captioner(
    folder: Path, *, processor: dict[str, Any] | None = None, generation: dict[str, Any] | None = None, **shape: Any
) -> Path:
    """Save a random captioner to `folder`. Its tokens contain characters that caption files must escape."""
    random_captioner(vocabulary=VOCABULARY, **shape).save_pretrained(folder)
    save_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | (processor or {})))
    change_json(folder / "generation_config.json", {"max_new_tokens": 12} | (generation or {}))
    return folder


def save_words(folder: Path) -> None:
    """Save a tokenizer with one word per token; padding, start and end are the last three ids."""
    words = AWKWARD + [f"word{n}" for n in range(len(AWKWARD), VOCABULARY - 3)] + ["<pad>", "<start>", "<end>"]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<pad>"
    )
    tokenizer.save_pretrained(folder)


def change_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def paint(folder: Path, *names: str | bytes, seed: int = 0) -> Path:
    """Save a different picture under each of these names, in the format of the suffix."""
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        draw = np.random.default_rng((seed, number))
        small = Image.fromarray(draw.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        with open(path, "wb") as file:
            suffix = os.path.splitext(name)[1]
            kind = Image.registered_extensions().get(os.fsdecode(suffix).lower(), "PNG")
            small.resize((40 + number % 5, 36)).save(file, kind)
    return folder


@dataclass
class Ended:
    """The exit code and the output of a command."""

    code: int
    out: bytes
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


def call(*arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> Ended:
    """Run the command in this process, for tests to which a process of its own makes no difference."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    stdin_text = io.TextIOWrapper(io.BytesIO(stdin))
    code = 0
    with (
        mock.patch.object(sys, "argv", ["capcli", *map(str, arguments)]),
        mock.patch.multiple(sys, stdin=stdin_text, stdout=out, stderr=err),
        mock.patch.dict(os.environ, env or {}),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Ended(code, out.buffer.getvalue(), err.buffer.getvalue().decode())  # type: ignore[attr-defined]


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "default::ResourceWarning",
        **more,
    }


def spawn(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Start the command as a process in a new session."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [*COMMAND, *(a if isinstance(a, bytes) else str(a) for a in arguments)]
    return subprocess.Popen(command, env=environment(**(env or {})), start_new_session=True, **options)


def ended(process: subprocess.Popen[bytes]) -> Ended:
    """Wait for a process to end; kill it if it does not."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return Ended(process.returncode, out or b"", (err or b"").decode("utf-8", "replace"))


def execute(*arguments: object, **options: Any) -> Ended:
    return ended(spawn(*arguments, **options))


def shell(script: str, **variables: object) -> Ended:
    """Run a line of bash in which `capcli` is the command; `variables` are shell variables."""
    quoted = " ".join(COMMAND)
    env = environment(**{name: str(value) for name, value in variables.items()})
    whole = f'set -o pipefail; capcli() {{ {quoted} "$@"; }}; {script}'
    process = subprocess.Popen(
        ["bash", "-c", whole],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return ended(process)


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll until `ready()`; the test fails if the process ends before."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, (process.returncode, ended(process).err)
        assert time.monotonic() < deadline
        time.sleep(0.002)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
