"""The folder of `capcli train`: other files in it are never lost, and wrong commands do not change it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import tomli_w
from running import Ended, call
from training import ENCODER, history, paint_data, recipe, weights

TRAINED = ("config.json", "README.md", "tokenizer.json", "model.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a recipe of two steps, and its finished run in `done`."""
    place = tmp_path_factory.mktemp("folder")
    recipe(place / "run.toml", paint_data(place / "pictures"), max_steps=2, evaluate_every=2)
    result = train(place, place / "done")
    assert result.code == 0, result.err
    return place


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(place / "done", tmp_path / "out"))


def train(place: Path, out: Path, *arguments: object) -> Ended:
    return call("train", "--config", place / "run.toml", "--out", out, *arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "wrong",
    [
        ("--data", "nosuch.txt"),
        ("--encoder", "{0}/nosuch"),
        ("--tokenizer", "{0}/nosuch"),
        ("--freeze", "encoder"),
        ("--max-length", 65),
        ("--dtype", "float16"),
        ("--image-column", "nosuch"),
        ("--val-names", "{0}/nosuch"),
        ("--threads", 1, "--vocab-size", 300, "--patience", 2, "--val-limit", 0),
    ],
    ids=lambda wrong: wrong[-2],
)
def test_a_wrong_command_changes_nothing(place: Path, out: Path, tmp_path: Path, wrong: tuple[object, ...]) -> None:
    before = contents(out)
    given = [str(each).format(tmp_path) for each in wrong]
    result = train(place, out, "--overwrite", *given)
    assert result.code in (1, 2), result.err
    assert contents(out) == before
    assert train(place, tmp_path / "new", *given).code == result.code
    assert not (tmp_path / "new").exists()


def test_only_files_that_a_run_wrote_are_overwritten(place: Path, out: Path) -> None:
    foreign = [out / name for name in ("notes.txt", "checkpoints/mine", "tensorboard/mine", "vocab.txt")]
    for path in foreign[:3]:
        path.write_text("mine")
    (out / "checkpoints" / "checkpoint-1").mkdir()
    assert train(place, out, "--overwrite").code == 0
    assert [path.read_text() for path in foreign[:3]] == ["mine"] * 3
    assert sorted(os.listdir(out / "checkpoints")) == ["checkpoint-2", "mine"]
    assert len(os.listdir(out / "tensorboard")) == 2
    assert weights(out) == weights(place / "done")
    foreign[3].write_text("a vocabulary")
    refused = train(place, out, "--overwrite")
    assert refused.code == 2
    assert "vocab.txt, which no training run wrote" in refused.err
    assert foreign[3].read_text() == "a vocabulary"


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("model", "."),
        ("model", "checkpoints/checkpoint-2"),
        ("tokenizer", "../link"),
        ("encoder", "config.json"),
        ("data", "checkpoints/captions.txt"),
        ("image-root", "tensorboard"),
    ],
)
def test_inputs_of_the_run_are_not_overwritten(place: Path, out: Path, option: str, path: str) -> None:
    (out / ".." / "link").symlink_to(out)
    before = contents(out)
    result = train(place, out, "--overwrite", f"--{option}", out / path)
    assert result.code == 2
    assert f"--{option} {out / path} is among the files that --overwrite would remove" in result.err
    assert contents(out) == before


@pytest.mark.parametrize("flag", [(), ("--resume",), ("--overwrite",)])
@pytest.mark.parametrize("begun", [{}, {"train.toml": "seed = 1", "run.json": "{}"}])
def test_a_folder_that_no_run_wrote_is_refused(
    place: Path, tmp_path: Path, begun: dict[str, str], flag: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    if not begun:
        (out / "checkpoints" / "game.sav").write_text("level 9")
    for name, text in {"README.md": "mine", "config.json": "{}", **begun}.items():
        (out / name).write_text(text)
    before = contents(out)
    result = train(place, out, *flag)
    assert result.code == 2
    assert contents(out) == before


def test_a_run_killed_at_its_start_is_begun_again_without_removing_other_files(place: Path, out: Path) -> None:
    for name in (*TRAINED, *os.listdir(out)):
        if (out / name).is_file() and name not in ("run.json", "train.toml", "history.csv"):
            os.remove(out / name)
    shutil.rmtree(out / "checkpoints")
    facts = (out / "run.json").read_text()
    (out / "run.json").write_text(facts.replace('"left"', '"never"'))
    (out / "README.md").write_text("mine")
    for flag in ((), ("--resume",), ("--overwrite",)):
        assert "README.md, which no training run wrote" in train(place, out, *flag).err
    assert (out / "README.md").read_text() == "mine"
    os.remove(out / "README.md")
    result = train(place, out)
    assert result.code == 0, result.err
    assert weights(out) == weights(place / "done")


def test_a_folder_without_its_checkpoints_still_counts_as_a_run(place: Path, out: Path) -> None:
    shutil.rmtree(out / "checkpoints")
    before = contents(out)
    for flag, words in (((), "--overwrite deletes it"), (("--resume",), "no checkpoint to resume from")):
        result = train(place, out, *flag)
        assert result.code == 2
        assert words in result.err
        assert contents(out) == before
    assert train(place, out, "--overwrite").code == 0
    assert history(out)[-1]["step"] == "2"


def test_resuming_needs_a_run(tmp_path: Path) -> None:
    result = call("train", "--out", tmp_path / "nowhere", "--resume")
    assert result.code == 2
    assert "contains no run to resume" in result.err


def test_a_changed_encoder_is_refused_naming_the_changed_value(out: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(tomli_w.dumps({"model": {"encoder": {**ENCODER, "hidden_size": 32}}}))
    result = call("train", "--config", other, "--out", out, "--resume")
    assert result.code == 2
    assert "encoder = a table with hidden_size = 16, and now it is a table with hidden_size = 32" in result.err
    assert "patch_size" not in result.err


@pytest.mark.parametrize("given", [("--model",), ("--encoder", "--decoder")])
def test_a_flag_replaces_the_parts_in_a_file(place: Path, tmp_path: Path, given: tuple[str, ...]) -> None:
    """The file names encoder, decoder and tokenizer, or a model; only the missing path is reported."""
    if given != ("--model",):
        text = f'[data]\ndata = "{place / "pictures" / "captions.txt"}"\n[model]\nmodel = "m"\n'
        (tmp_path / "run.toml").write_text(text)
    where = place if given == ("--model",) else tmp_path
    result = train(where, tmp_path / "out", *(part for flag in given for part in (flag, tmp_path / "nosuch")))
    assert result.code == 2
    assert "nosuch" in result.err
    assert "cannot be combined" not in result.err


NUMBERS = {
    "learning-rate": ("nan", "inf"),
    "epochs": ("nan", "inf"),
    "warmup": ("nan", "inf", "1.5"),
    "weight-decay": ("nan", "inf"),
    "max-grad-norm": ("nan", "inf"),
    "adam-beta2": ("nan",),
    "label-smoothing": ("nan",),
    "decode-timeout": ("nan",),
    "seed": ("-1", str(2**33)),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_a_wrong_number_is_refused_naming_its_option(place: Path, tmp_path: Path, name: str, value: str) -> None:
    result = train(place, tmp_path / "out", f"--{name}", value)
    assert result.code == 2
    assert f"--{name}" in result.err
    (tmp_path / "run.toml").write_text(f"[train]\n{name.replace('-', '_')} = {value}\n")
    data = ("--data", place / "pictures" / "captions.txt", "--model", place / "done")
    result = call("train", "--config", tmp_path / "run.toml", "--out", tmp_path / "out", *data)
    assert result.code == 2
    assert f"--{name}" in result.err
    assert not (tmp_path / "out").exists()


def test_the_card_gives_the_number_of_images_behind_each_figure(place: Path, tmp_path: Path) -> None:
    text = (place / "done" / "README.md").read_text()
    assert (
        "On 3 validation images, of which 2 were captioned (the loss covers all), with the weights of step 2." in text
    )
    flags = ("--caption-images", 0, "--max-steps", 1)
    name = "it's $mine"
    result = train(place, tmp_path / name, *flags)
    assert result.code == 0, result.err
    assert "On 3 validation images, with the weights of step 1." in (tmp_path / name / "README.md").read_text()
    quoted = str(tmp_path / name).replace("'", "'\"'\"'")
    assert result.err.endswith(f"--model '{quoted}'\n")
