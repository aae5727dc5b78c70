"""`capcli train --lora`: adapters of vision-language models and of families, through the real command."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import save_family
from PIL import Image
from running import call, execute
from safetensors.torch import load_file
from vlms import save_vlm

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
COLOURS = {"red": (220, 30, 30), "green": (20, 170, 40), "blue": (30, 40, 220), "white": (245, 245, 245)}
EVERYWHERE = r".*(_proj|fc1|fc2|lm_head|linear_1|linear_2|proj|dense|query|key|value)"
QUIET = ("--workers", 0, "--device", "cpu", "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of one colour each, with noise, and a caption that names it."""
    folder = tmp_path_factory.mktemp("colours")
    draw, rows = np.random.default_rng(0), []
    for number in range(48):
        name = list(COLOURS)[number % len(COLOURS)]
        noise = draw.integers(-25, 25, (28, 28 + 8 * (number % 3), 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        rows.append(f"{number:02d}.png,a {name} picture,{'dark' if number % 2 else 'light'}")
    (folder / "captions.csv").write_text("file_name,caption,tags\n" + "\n".join(rows) + "\n")
    return folder


def train(base: Path, data: Path, out: Path, *flags: object, run: Any = execute, **options: Any) -> Any:
    command = ("train", "--model", base, "--lora", "--data", data / "captions.csv", "--out", out)
    done = run(*command, "--val-fraction", 0.25, "--batch-size", 4, *QUIET, *flags, **options)
    assert "Traceback" not in done.err
    return done


def right(data: Path, model: Path, *flags: object) -> float:
    """The share of pictures whose caption is right."""
    done = call("caption", data, "--model", model, "--workers", 0, "--dtype", "float32", *flags)
    assert done.code == 0, done.err
    names = [list(COLOURS)[int(row["file_name"][:2]) % len(COLOURS)] for row in done.rows]
    return sum(row["text"] == f"a {name} picture" for row, name in zip(done.rows, names, strict=True)) / len(names)


@pytest.mark.parametrize("kind", ["smolvlm", "llava"])
def test_an_adapter_learns_what_is_in_the_picture(kind: str, data: Path, tmp_path: Path) -> None:
    base = save_vlm(tmp_path / "base", kind)
    flags = ("--max-steps", 150, "--learning-rate", 0.005, "--lora-targets", EVERYWHERE, "--prompt", "Which colour?")
    done = train(base, data, tmp_path / "run", *flags, "--evaluate-every", 150, "--workers", 1)
    assert done.code == 0, done.err
    assert "fork" not in done.err
    assert "LoRA of rank 16 in" in done.err
    assert right(data, tmp_path / "run", "--prompt", "Which colour?") > 0.9  # four colours: chance is 0.25
    assert right(data, base, "--prompt", "Which colour?") == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "history.csv"} <= set(
        os.listdir(tmp_path / "run")
    )


def test_plain_peft_loads_the_adapter(data: Path, tmp_path: Path) -> None:
    base = save_vlm(tmp_path / "base", "llava")
    assert train(base, data, tmp_path / "run", "--max-steps", 4, "--learning-rate", 0.01).code == 0
    model = transformers.LlavaForConditionalGeneration.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "run").eval()
    config = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["peft_type"], config["r"]) == (str(base), "LORA", 16)
    processor = transformers.AutoProcessor.from_pretrained(base, backend="pil")
    text = "<s>user: <image>Describe this image in one sentence.assistant:"
    inputs = processor(images=Image.open(data / "03.png"), text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    row = call(
        "caption", data / "03.png", "--model", tmp_path / "run", "--max-new-tokens", 8, "--dtype", "float32"
    ).rows[0]
    assert row["text"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_run_in_two_parts_gives_the_adapter_of_a_whole_one(data: Path, tmp_path: Path) -> None:
    base = save_vlm(tmp_path / "base", "smolvlm")
    flags = ("--schedule", "constant", "--evaluate-every", 3, "--prompt", "It is {tags}.", "--tags-column", "tags")
    assert train(base, data, tmp_path / "whole", *flags, "--max-steps", 6).code == 0
    assert train(base, data, tmp_path / "parts", *flags, "--max-steps", 3).code == 0
    resumed = execute("train", "--resume", "--out", tmp_path / "parts", "--max-steps", 6)
    assert resumed.code == 0, resumed.err
    whole, parts = (
        load_file(tmp_path / name / "checkpoints/checkpoint-6/adapter_model.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = load_file(tmp_path / "parts/checkpoints/checkpoint-6/adapter_model.safetensors")
    assert any(bool(value.abs().sum()) for name, value in start.items() if "lora_B" in name)


@pytest.mark.parametrize("family", ["blip", "git", "florence2"])
def test_families_learn_adapters_too(family: str, data: Path, tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", family)
    flags = ("--max-steps", 6, "--evaluate-every", 3, "--schedule", "constant", "--learning-rate", 0.01)
    done = train(base, data, tmp_path / "run", *flags)
    assert done.code == 0, done.err
    with open(tmp_path / "run/history.csv", newline="") as file:
        losses = [float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]]
    assert losses[-1] < losses[0]
    rows = call("caption", data, "--adapter", tmp_path / "run", "--workers", 0, "--limit", 3).rows
    assert [row["text"] for row in rows] != [
        row["text"] for row in call("caption", data, "--model", base, "--workers", 0, "--limit", 3).rows
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora-targets", "("), "is no regular expression"),
        (("--lora-targets", "nothing"), "no linear layer of"),
        (("--freeze", "encoder"), "leave --freeze encoder out"),
        (("--num-beams", 4), "an adapter stores no generation settings"),
        (("--tags-column", "tags", "--prompt", "What?"), "no {tags} that stands for them"),
    ],
)
def test_options_that_do_not_go_with_an_adapter(
    flags: tuple[str, ...], message: str, data: Path, tmp_path: Path
) -> None:
    done = train(save_vlm(tmp_path / "base", "llava"), data, tmp_path / "run", *flags, run=call)
    assert done.code == 2, done.err
    assert message in done.err


def test_a_whole_vision_language_model_is_not_trained(data: Path, tmp_path: Path) -> None:
    base = save_vlm(tmp_path / "base", "llava")
    command = (
        "train",
        "--model",
        base,
        "--data",
        data / "captions.csv",
        "--val-fraction",
        0.25,
        "--out",
        tmp_path / "run",
    )
    done = call(*command)
    assert (done.code, "only an adapter" in done.err) == (2, True), done.err
    rank = call(*command, "--lora-rank", 4)
    assert (rank.code, "--lora-rank has no effect without --lora" in rank.err) == (2, True), rank.err
