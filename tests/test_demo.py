"""The demo, as the README shows it: the drawn scenes are captioned right, by the command and from Python."""

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


def captioned(out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows that `make demo` leaves, with `options`."""
    done = call("caption", PICTURES, "--model", MODEL, "--out", out, *options)
    assert (done.code, done.out) == (0, b""), done.err
    assert done.err.startswith(f"{COUNT} captioned, 0 skipped, 0 failed")
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("options", [[], ["--dtype", "float32"]], ids=["the default", "float32"])
def test_every_picture_is_captioned_right_and_in_order(tmp_path: Path, options: list[str]) -> None:
    rows = captioned(tmp_path / "captions.jsonl", *options)
    assert [row["file_name"] for row in rows] == NAMES
    for index, row in enumerate(rows):
        assert scenes.judge(row["text"], scenes.make_scene(PICTURES_SEED, index)).right, row
        assert -1 < row["score"] <= 0
    assert not (tmp_path / "captions.failures.jsonl").exists()


def test_in_float32_the_captions_are_those_of_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

    model = VisionEncoderDecoderModel.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(MODEL), AutoImageProcessor.from_pretrained(MODEL)
    theirs = []
    for name in NAMES:
        with Image.open(PICTURES / name) as picture, torch.inference_mode():
            ids = model.generate(**processor(picture.convert("RGB"), return_tensors="pt"))
        theirs += tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert len(set(theirs)) > COUNT // 2
    assert [row["text"] for row in captioned(tmp_path / "captions.jsonl", "--dtype", "float32")] == theirs


def test_the_python_example_of_the_readme_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = (each for each in EXAMPLE.findall((ROOT / "README.md").read_text("utf-8")) if "Captioner" in each)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    line, failed = capsys.readouterr().out.splitlines()
    assert failed.startswith("broken.jpg failed: ")
    name, said = line.split(" ", 1)
    text, score = said.rsplit(" ", 1)
    assert name == f"examples/scenes/{NAMES[0]}"
    assert scenes.judge(text, scenes.make_scene(PICTURES_SEED, 0)).right, text
    assert -1 < float(score) <= 0
