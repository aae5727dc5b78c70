"""The demo model captions the example scenes correctly, by the command and by the Python example of the README."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import call
from test_scenes import MODEL, PICTURES, PICTURES_SEED, scenes

ROOT = Path(__file__).parents[1]
COUNT = 24
NAMES = [f"scene-{index:04d}{('.jpg', '.png', '.webp')[index % 3]}" for index in range(COUNT)]
EXAMPLE = re.compile("^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def rows_of_demo(out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that `make demo` writes, with these options."""
    done = call("caption", PICTURES, "--model", MODEL, "--out", out, *options)
    assert (done.code, done.out) == (0, b""), done.err
    assert done.err.startswith(f"{COUNT} captioned, 0 skipped, 0 failed")
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def check(rows: list[dict[str, Any]]) -> None:
    """Every scene has a correct caption and a plausible score, in the order of the names."""
    assert [row["file_name"] for row in rows] == NAMES
    for index, row in enumerate(rows):
        assert scenes.judge(row["text"], scenes.make_scene(PICTURES_SEED, index)).right, row
        assert -1 < row["score"] <= 0


def test_default_options_caption_every_scene_correctly(tmp_path: Path) -> None:
    check(rows_of_demo(tmp_path / "captions.jsonl"))
    assert not (tmp_path / "captions.failures.jsonl").exists()


def test_captions_in_float32_are_correct_and_those_of_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(MODEL), AutoImageProcessor.from_pretrained(MODEL)
    expected = []
    for name in NAMES:
        with Image.open(PICTURES / name) as picture, torch.inference_mode():
            ids = model.generate(**processor(picture.convert("RGB"), return_tensors="pt"))
        expected += tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(set(expected)) > COUNT // 2
    rows = rows_of_demo(tmp_path / "captions.jsonl", "--dtype", "float32")
    check(rows)
    assert [row["text"] for row in rows] == expected


def test_the_python_example_of_the_readme_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = (block for block in EXAMPLE.findall((ROOT / "README.md").read_text("utf-8")) if "Captioner" in block)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    line, failed = capsys.readouterr().out.splitlines()
    assert failed.startswith("broken.jpg failed: ")
    name, rest = line.split(" ", 1)
    text, score = rest.rsplit(" ", 1)
    assert name == f"examples/scenes/{NAMES[0]}"
    assert scenes.judge(text, scenes.make_scene(PICTURES_SEED, 0)).right, text
    assert -1 < float(score) <= 0
