"""What an earlier version of capcli wrote is still read: captions, run files, engines, prepared data, training runs.

`earlier_version/` holds them as `capcli caption`, `export`, `prepare` and `train` of November 2026 left them: ten of the
scenes captioned greedily and with beams, and twelve painted pictures with a captioner trained on them for 12 steps (`trained`),
or killed after 8 of 16 (`stopped`).
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import transformers
from running import Ended, execute

pytestmark = pytest.mark.slow

EARLIER = Path(__file__).parent / "earlier_version"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def capcli(folder: Path, *arguments: object) -> Ended:
    """The real command in `folder`: the earlier one was given paths relative to it."""
    return execute(*arguments, cwd=folder)


@pytest.fixture
def captions(earlier: Path) -> Path:
    """The caption files; their run files name the folder of scenes where it is on this machine."""
    for path in (earlier / "captions").glob("*.run.json"):
        run = json.loads(path.read_text())
        path.write_text(json.dumps(run | {"folder": str((EXAMPLES / "scenes").resolve())}))
    return earlier / "captions"


@pytest.mark.parametrize(("name", "beams"), [("greedy.jsonl", 1), ("beams.csv", 4)])
def test_a_caption_run_goes_on(captions: Path, name: str, beams: int) -> None:
    before = (captions / name).read_bytes()
    demo = (
        "caption",
        EXAMPLES / "scenes",
        "--model",
        EXAMPLES / "demo-model",
        "--dtype",
        "float32",
        "--out",
        captions / name,
    )
    refused = capcli(captions, *demo, "--num-beams", 2)
    assert refused.code == 2, refused.err
    assert f"num_beams was {beams}, is now 2" in refused.err
    done = capcli(captions, *demo, "--num-beams", beams)
    assert done.code == 0, done.err
    after = (captions / name).read_bytes()
    assert after.startswith(before)
    lines = after.decode().splitlines()
    rows = list(csv.DictReader(lines)) if name.endswith(".csv") else [json.loads(line) for line in lines]
    names = [row["file_name"] for row in rows]
    assert names == sorted(set(names))
    assert len(names) == 24


def test_an_engine_captions_or_is_refused_with_the_command_that_builds_it_again(earlier: Path) -> None:
    def captioned(model: str) -> Ended:
        return capcli(earlier, "caption", "pictures", "--model", model, "--dtype", "float32", "--out", f"{model}.jsonl")

    done = captioned("engine")
    if done.code == 1:  # another ONNX Runtime than it was built with
        assert "Build it again: capcli export --onnx" in done.err, done.err
        return
    assert done.code == 0, done.err
    assert captioned("trained").code == 0
    texts = [
        [json.loads(line)["text"] for line in (earlier / f"{model}.jsonl").read_text().splitlines()]
        for model in ("engine", "trained")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 12


def test_prepared_data_can_be_trained_on_and_is_not_overwritten(earlier: Path) -> None:
    shards = {path: path.read_bytes() for path in (earlier / "prepared").rglob("*.arrow")}
    again = ("prepare", "--data", "pictures/captions.txt", "--val-fraction", 0.25, "--out", "prepared")
    refused = capcli(earlier, *again)  # the images were in another folder
    assert refused.code == 2, refused.err
    assert "--overwrite" in refused.err
    trained = capcli(
        earlier,
        "train",
        "--data",
        "prepared",
        "--model",
        "trained",
        "--max-steps",
        2,
        "--device",
        "cpu",
        "--out",
        "more",
    )
    assert trained.code == 0, trained.err
    assert shards == {path: path.read_bytes() for path in (earlier / "prepared").rglob("*.arrow")}


def test_a_trained_folder_loads_in_transformers(earlier: Path) -> None:
    transformers.VisionEncoderDecoderModel.from_pretrained(earlier / "trained")
    transformers.AutoTokenizer.from_pretrained(earlier / "trained")
    transformers.AutoImageProcessor.from_pretrained(earlier / "trained")


def test_a_stopped_training_run_resumes(earlier: Path) -> None:
    done = capcli(earlier, "train", "--out", "stopped", "--resume")
    assert done.code == 0, done.err
    assert "resuming from checkpoint-8" in done.err
    with open(earlier / "stopped" / "history.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)][-1] == "16"
    assert (earlier / "stopped" / "model.safetensors").exists()
