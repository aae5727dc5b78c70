"""A training run from begin to end: what learns and when, what stops it, what it goes on from, what it says."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from running import Ended, call, environment
from safetensors.torch import load_file
from training import MACHINE, history, paint_data, recipe, weights

from capcli.training.data.pairs import Images
from capcli.training.loop.callbacks import ScheduleCallback
from capcli.training.loop.loss import token_loss
from capcli.training.output.history import History


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a recipe of six steps on nine of them."""
    place = tmp_path_factory.mktemp("training")
    recipe(place / "run.toml", paint_data(place / "pictures"))
    return place


@pytest.fixture(scope="module")
def six(place: Path) -> Path:
    """The six steps unbroken."""
    return succeeded(place, place / "six")


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[None]:
    """Curves are drawn in the runs that tests share; in the others they would take most of the time."""
    with mock.patch.object(History, "draw"):
        yield


def train(place: Path, out: Path, *arguments: object) -> Ended:
    return call("train", "--config", place / "run.toml", "--out", out, *arguments)


def succeeded(place: Path, out: Path, *arguments: object) -> Path:
    result = train(place, out, *arguments)
    assert result.code == 0, result.err
    assert result.out == b""
    return out


def same(folder: Path) -> list[dict[str, str]]:
    """history.csv but for what the machine has to do with."""
    return [{name: cell for name, cell in row.items() if name != MACHINE} for row in history(folder)]


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in history(folder) if row[name]]


def checkpoints(folder: Path) -> set[int]:
    return {int(name.split("-")[1]) for name in os.listdir(folder / "checkpoints")}


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """In it, a run is interrupted at this step, as a signal would have it."""

    def asked(callback: ScheduleCallback, args: Any) -> bool:  # noqa: ARG001
        return steps.global_step == step

    steps = None

    def heed(callback: ScheduleCallback, args: Any, state: Any, control: Any, **given: Any) -> Any:
        nonlocal steps
        steps = state
        return original(callback, args, state, control, **given)

    original = ScheduleCallback.on_step_end
    with mock.patch.multiple(ScheduleCallback, on_step_end=heed, _asked_to_stop=asked):
        yield


def left_out(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "data.failures.jsonl").read_text().splitlines()]


# What is learnt


def test_label_smoothing_gives_a_share_of_the_truth_to_all_tokens() -> None:
    logits = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, 3], [4, -100, -100]])
    chances = logits.log_softmax(-1)
    real = [chances[0, 0], chances[0, 1], chances[0, 2], chances[1, 0]]
    truth = -sum(row[token] for row, token in zip(real, (1, 2, 3, 4), strict=True))
    even = -sum(row.mean() for row in real)
    outputs = type("Outputs", (), {"logits": logits})
    for share in (0.0, 0.3):
        expected = ((1 - share) * truth + share * even) / 4
        torch.testing.assert_close(token_loss(outputs, labels, label_smoothing=share), expected)
        torch.testing.assert_close(token_loss(outputs, labels, torch.tensor(8), label_smoothing=share), expected / 2)


def test_images_that_all_broke_teach_nothing() -> None:
    outputs = type("Outputs", (), {"logits": torch.randn(2, 3, 7)})
    labels = torch.full((2, 3), -100)
    assert token_loss(outputs, labels, labels.ne(-100).sum()) == 0


def test_checkpointed_gradients_are_the_same(place: Path, six: Path, tmp_path: Path) -> None:
    out = succeeded(place, tmp_path / "out", "--gradient-checkpointing")
    for name in ("loss", "grad_norm", "val_loss"):
        assert column(out, name) == pytest.approx(column(six, name), rel=1e-5)


def test_bfloat16_learns_about_the_same_and_is_kept_in_float32(place: Path, six: Path, tmp_path: Path) -> None:
    out = succeeded(place, tmp_path / "out", "--dtype", "bfloat16")
    assert column(out, "val_loss") == pytest.approx(column(six, "val_loss"), rel=0.01)
    assert column(out, "loss") != column(six, "loss")
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.float32}


RATES = {
    "linear": [1.0, 0.8, 0.6, 0.4, 0.2],
    "cosine": [(1 + math.cos(math.pi * n / 5)) / 2 for n in range(5)],
    "polynomial": [1.0, 0.8, 0.6, 0.4, 0.2],
    "constant_with_warmup": [1.0] * 5,
    "inverse_sqrt": [math.sqrt(1 / (1 + n)) for n in range(5)],
}


@pytest.mark.parametrize("schedule", RATES)
def test_a_share_of_the_updates_warms_up(place: Path, tmp_path: Path, schedule: str) -> None:
    arguments = ("--schedule", schedule, "--learning-rate", 0.01, "--warmup", 1 / 6, "--evaluate-every", 6)
    out = succeeded(place, tmp_path / "out", *arguments, "--caption-images", 0)
    rates = column(out, "learning_rate")
    assert rates[0] == 0
    if schedule not in ("inverse_sqrt", "polynomial"):  # which have constants of their own
        assert rates[1:] == pytest.approx([0.01 * share for share in RATES[schedule]])
    else:
        assert rates[1] == pytest.approx(0.01)
        assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_plateau_lowers_the_learning_rate(place: Path, tmp_path: Path) -> None:
    plateau = ("--schedule", "reduce_lr_on_plateau", "--evaluate-every", 1, "--max-steps", 16, "--caption-images", 0)
    out = succeeded(place, tmp_path / "out", *plateau, "--learning-rate", 1e-6)
    rates = column(out, "learning_rate")
    assert rates[0] == 1e-6
    assert rates[-1] == pytest.approx(1e-7)


# What is frozen


def test_what_was_frozen_learns_from_its_moment_on(place: Path, six: Path, tmp_path: Path) -> None:
    data = place / "pictures" / "captions.txt"
    (tmp_path / "run.toml").write_text(
        f'[train]\ndata = "{data}"\nval_fraction = 0.25\nmodel = "{six}"\nmax_steps = 6\nbatch_size = 4\n'
        'evaluate_every = 2\nkeep_best = 9\ncaption_images = 0\nlog_every = 1\nlearning_rate = 0.01\nfreeze = "encoder"\n'
        'unfreeze_after = 4\ndevice = "cpu"\nthreads = 1\nworkers = 0\n'
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = call("train", "--config", tmp_path / "run.toml", "--out", whole)
    assert result.code == 0, result.err
    at = {step: load_file(whole / "checkpoints" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6)}
    before = load_file(six / "model.safetensors")
    seeing = [name for name in before if name.startswith("encoder.") and "pooler" not in name]
    for step, changed in ((2, False), (4, False), (6, True)):
        assert all(torch.equal(before[name], at[step][name]) != changed for name in seeing), step
    assert not torch.equal(before["decoder.transformer.wte.weight"], at[2]["decoder.transformer.wte.weight"])
    for step in (3, 5):
        with stopping_at(step):
            cut = call("train", "--config", tmp_path / "run.toml", "--out", broken, "--overwrite")
        assert "interrupted" in cut.err
        further = call("train", "--out", broken, "--resume")
        assert further.code == 0, further.err
        assert same(broken) == same(whole), step
        assert weights(broken) == weights(whole), step


# What stops it


def test_it_stops_where_it_no_longer_gets_better_and_is_finished(place: Path, tmp_path: Path) -> None:
    patient = ("--evaluate-every", 1, "--patience", 3, "--learning-rate", 1e-30)
    out = succeeded(place, tmp_path / "out", *patient)
    assert [row["step"] for row in history(out)] == ["1", "2", "3", "4"]
    assert checkpoints(out) == {1, 4}
    before, was = same(out), weights(out)
    again = call("train", "--out", out, "--resume")
    assert again.code == 0, again.err
    assert "finished" in again.err
    assert same(out) == before
    assert weights(out) == was
    further = call("train", "--out", out, "--resume", "--patience", 4)
    assert further.code == 0, further.err
    assert [row["step"] for row in history(out)] == ["1", "2", "3", "4", "5"]


def test_a_loss_that_is_no_number_is_an_error(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "out", "--learning-rate", 1e30, "--max-grad-norm", 0)
    assert result.code == 1
    assert "the loss became nan before step" in result.err
    assert "--learning-rate" in result.err


def test_a_full_disk_is_one_error_and_the_run_goes_on_from_what_is_whole(
    place: Path, six: Path, tmp_path: Path
) -> None:
    biggest = (six / "model.safetensors").stat().st_size
    out = tmp_path / "out"

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (biggest + 1000, before[1]))
    try:
        full = train(place, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.code == 1
    assert "cannot be written" in full.err
    assert "Traceback" not in full.err
    assert full.err.splitlines()[-1].startswith("capcli: the checkpoint ")
    result = call("train", "--out", out, "--resume")
    assert result.code == 0, result.err
    assert same(out) == same(six)
    assert weights(out) == weights(six)


def test_a_folder_that_cannot_be_written_is_named(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = train(place, tmp_path / "file" / "out")
    assert result.code == 1
    assert "cannot be written" in result.err
    assert str(tmp_path / "file") in result.err


# What it goes on from


def test_more_steps_can_be_asked_of_a_finished_run(six: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(six, tmp_path / "out"))
    finished = call("train", "--out", out, "--resume")
    assert finished.code == 0, finished.err
    assert "finished" in finished.err
    assert same(out) == same(six)
    assert weights(out) == weights(six)
    record = [(out / name).read_bytes() for name in ("train.toml", "README.md", "run.json")]
    fewer = call("train", "--out", out, "--resume", "--max-steps", 3, "--select", "cider", "--log-every", 5)
    assert fewer.code == 0, fewer.err
    assert [(out / name).read_bytes() for name in ("train.toml", "README.md", "run.json")] == record
    assert weights(out) == weights(six)
    further = call("train", "--out", out, "--resume", "--max-steps", 8)
    assert further.code == 0, further.err
    assert "from step 6 on the schedule runs to step 8, no longer to 6" in further.err
    assert "At step 6 the run was gone on with, to end at step 8 in place of 6." in (out / "README.md").read_text()
    assert same(out)[:6] == same(six)
    assert [row["step"] for row in history(out)] == [str(step) for step in range(1, 9)]


EPOCHS = ("--accumulation", 2, "--evaluate-every", "epoch", "--save-every", 2, "--log-every", 4, "--epochs", 3)
PLATEAU = ("--schedule", "reduce_lr_on_plateau", "--evaluate-every", 2, "--select", "cider", "--keep-best", 3)


def test_epochs_end_where_they_end(tmp_path: Path) -> None:
    """Nine images with two captions each, four at a time in updates of two: three updates, the last of one batch."""
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"))
    (tmp_path / "run.toml").write_text((tmp_path / "run.toml").read_text().replace("max_steps = 6\n", ""))
    out = succeeded(tmp_path, tmp_path / "out", *EPOCHS)
    assert all(row["loss"] for row in history(out))
    told = [(row["step"], float(row["epoch"]), bool(row["val_loss"])) for row in history(out)]
    assert told == [("3", 1, True), ("4", 1 + 2 / 5, False), ("6", 2, True), ("8", 2 + 4 / 5, False), ("9", 3, True)]


@pytest.mark.parametrize(
    ("options", "seed"), [(EPOCHS, 1), (PLATEAU, 2), (("--workers", 1, "--dtype", "bfloat16", "--max-steps", 7), 3)]
)
def test_wherever_it_is_interrupted_it_goes_on_as_if_unbroken(
    tmp_path: Path, options: tuple[object, ...], seed: int
) -> None:
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"))
    text = (
        (tmp_path / "run.toml").read_text().replace("max_steps = 6\n", "" if options is EPOCHS else "max_steps = 8\n")
    )
    (tmp_path / "run.toml").write_text(text)
    whole = succeeded(tmp_path, tmp_path / "whole", *options, "--seed", seed)
    out = tmp_path / "out"
    steps = random.Random(seed).sample(range(1, int(history(whole)[-1]["step"])), 2)
    for step in sorted(steps):
        with stopping_at(step):
            cut = train(tmp_path, out, *options, "--seed", seed, "--resume")
        assert "interrupted; --resume goes on" in cut.err, cut.err
        assert step in checkpoints(out)
        assert (out / "model.safetensors").exists()
    further = call("train", "--out", out, "--resume")
    assert further.code == 0, further.err
    assert same(out) == same(whole), steps
    assert weights(out) == weights(whole), steps
    assert checkpoints(out) >= checkpoints(whole)


def test_other_data_is_refused(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=2)
    out = succeeded(tmp_path, tmp_path / "out")
    data.write_text(data.read_text().replace("on grey", "on gray"))
    result = call("train", "--out", out, "--resume", "--max-steps", 4)
    assert result.code == 1
    assert "the data has changed" in result.err
    assert "captions or names of images are others" in result.err
    os.remove(data)
    assert call("train", "--out", out, "--resume", "--max-steps", 4).code == 2


def test_resume_begins_what_was_never_begun(place: Path, six: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)  # as far as a run got that was killed at once
    out = succeeded(place, tmp_path / "out", "--resume")
    assert weights(out) == weights(six)


# What it goes without


def test_nothing_validates(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    config = recipe(tmp_path / "run.toml", data, evaluate_every=2, keep_best=5)
    config.write_text(config.read_text().replace("val_fraction = 0.25\n", ""))
    out = tmp_path / "out"
    result = train(tmp_path, out)
    assert result.code == 0, result.err
    assert "nothing validates" in result.err
    assert checkpoints(out) == {6}
    assert not column(out, "val_loss")
    assert weights(out) == weights(out / "checkpoints" / "checkpoint-6")
    for flags in (("--patience", 1), ("--schedule", "reduce_lr_on_plateau")):
        refused = train(tmp_path, tmp_path / "other", *flags)
        assert refused.code == 2
        assert flags[0].strip("-") in refused.err
        assert "nothing validates" in refused.err


def test_the_best_by_cider_are_kept(tmp_path: Path) -> None:
    """On so little, captions are soon right for some of the images: CIDEr goes up and down."""
    data = paint_data(tmp_path / "pictures", 24)
    flags = ("--select", "cider", "--keep-best", 2, "--caption-images", 6, "--evaluate-every", 10, "--max-steps", 70)
    recipe(tmp_path / "run.toml", data, learning_rate=0.02, log_every=10)
    out = succeeded(tmp_path, tmp_path / "out", *flags)
    scores = {int(row["step"]): float(row["CIDEr"]) for row in history(out)}
    assert len(set(scores.values())) > 2, scores
    ranked = sorted(scores, key=lambda step: (-scores[step], step))
    assert checkpoints(out) == {*ranked[:2], 70}
    assert weights(out) == weights(out / "checkpoints" / f"checkpoint-{ranked[0]}")
    assert f"{scores[ranked[0]]:.3f}" in (out / "README.md").read_text()


@pytest.mark.parametrize("way", ["loss", "cider"])
def test_of_equals_the_earlier_is_the_best_and_called_so(tmp_path: Path, way: str) -> None:
    """Captions of one token are all wrong, and so their CIDEr is 0 throughout; at a learning rate of nothing so is all else."""
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"), evaluate_every=2)
    flags = ("--max-new-tokens", 1, "--select", way)
    still = train(tmp_path, tmp_path / "still", *flags, "--learning-rate", 1e-30)
    assert [line.split(":")[0] for line in still.err.splitlines() if "best so far" in line] == ["step 2/6"]
    assert checkpoints(tmp_path / "still") == {2, 6}
    learning = train(tmp_path, tmp_path / "learning", *flags)
    losses = column(tmp_path / "learning", "val_loss")
    assert losses == sorted(losses, reverse=True)
    assert learning.err.count("best so far") == 3
    assert checkpoints(tmp_path / "learning") == {6}


# Images that break


def test_an_image_that_breaks_costs_its_own_rows_and_is_told_once(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=3)
    out = succeeded(tmp_path, tmp_path / "out")
    (tmp_path / "pictures" / "04.png").write_bytes(b"no picture")
    result = call("train", "--out", out, "--resume", "--max-steps", 15)
    assert result.code == 0, result.err
    assert result.err.count("04.png can no longer be loaded") == 1
    assert [each["file_name"] for each in left_out(out)] == ["04.png"]
    assert all(math.isfinite(loss) for loss in column(out, "loss"))
    assert "1" in (out / "README.md").read_text()
    again = call("train", "--out", out, "--resume", "--max-steps", 24)
    assert again.code == 0, again.err
    assert "can no longer" not in again.err
    assert [each["file_name"] for each in left_out(out)] == ["04.png"]


def test_where_all_images_break_it_ends(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=3)
    out = succeeded(tmp_path, tmp_path / "out")
    for name in os.listdir(tmp_path / "pictures"):
        if name.endswith(".png"):
            (tmp_path / "pictures" / name).write_bytes(b"no picture")
    result = call("train", "--out", out, "--resume", "--max-steps", 9)
    assert result.code == 1
    assert "could be loaded" in result.err
    assert result.err.count("is left out") <= 4
    assert (out / "checkpoints" / "checkpoint-3" / "optimizer.pt").exists()


def test_broken_images_are_left_out_the_same_when_gone_on_with(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    for name in ("03.png", "08.png"):
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    os.remove(tmp_path / "pictures" / "05.png")
    recipe(tmp_path / "run.toml", data, max_steps=4)
    whole = succeeded(tmp_path, tmp_path / "whole")
    assert sorted(each["file_name"] for each in left_out(whole)) == ["03.png", "05.png", "08.png"]
    out = succeeded(tmp_path, tmp_path / "out", "--max-steps", 3, "--schedule", "constant")
    further = call("train", "--out", out, "--resume", "--max-steps", 4)
    assert further.code == 0, further.err
    assert "1 missing, 2 broken" in further.err
    for name in ("03.png", "05.png", "08.png"):
        os.remove(tmp_path / "pictures" / name) if (tmp_path / "pictures" / name).exists() else None
    gone = call("train", "--out", out, "--resume", "--max-steps", 5)
    assert gone.code == 1


def test_a_process_that_loads_images_and_is_killed_is_one_error(place: Path, tmp_path: Path) -> None:
    def killed(images: Images, index: int) -> Any:  # noqa: ARG001
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Images, "loaded", killed):
        result = train(place, tmp_path / "out", "--workers", 1)
    assert result.code == 1
    assert "was ended from outside" in result.err
    assert "--workers 0" in result.err
    assert "--resume" in result.err


# What it leaves and says


def test_prepared_data_teaches_the_same(place: Path, six: Path, tmp_path: Path) -> None:
    data = place / "pictures" / "captions.txt"
    done = call("prepare", "--data", data, "--val-fraction", 0.25, "--format", "png", "--out", tmp_path / "copy")
    assert done.code == 0, done.err
    text = (place / "run.toml").read_text().replace(str(data), str(tmp_path / "copy"))
    (tmp_path / "run.toml").write_text(text.replace("val_fraction = 0.25\n", ""))
    out = succeeded(tmp_path, tmp_path / "out")
    assert sorted(column(out, "val_loss")) == pytest.approx(sorted(column(six, "val_loss")), rel=0.2)
    assert len(same(out)) == len(same(six))


def test_events_hold_the_curves(six: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(six / "tensorboard"))
    events.Reload()
    for tag, name in (
        ("training/loss", "loss"),
        ("training/learning_rate", "learning_rate"),
        ("validation/loss", "val_loss"),
        ("validation/CIDEr", "CIDEr"),
    ):
        told = [(event.step, event.value) for event in events.Scalars(tag)]
        rows = [(int(row["step"]), float(row[name])) for row in history(six) if row[name]]
        assert [step for step, _ in told] == [step for step, _ in rows]
        assert [value for _, value in told] == pytest.approx([value for _, value in rows], rel=1e-6)
    assert events.Tags()["tensors"]
    assert (six / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_settings_make_the_same_run_again(six: Path, tmp_path: Path) -> None:
    result = call("train", "--config", six / "train.toml", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert weights(tmp_path / "out") == weights(six)
    assert (tmp_path / "out" / "train.toml").read_bytes() == (six / "train.toml").read_bytes()


def test_only_its_own_lines_are_said(place: Path, six: Path, tmp_path: Path) -> None:
    """By two processes, with all that makes libraries talk; of images, the first alone says that one cannot be used."""
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "03.png").write_bytes(b"no picture")
    data = ("--data", tmp_path / "pictures" / "captions.txt", "--model", six, "--batch-size", 2, "--max-steps", 4)
    thawing = ("--freeze", "encoder", "--unfreeze-after", 2, "--evaluate-every", 4, "--out", tmp_path / "out")
    flags = ("--gradient-checkpointing", "--workers", 1, "--dtype", "bfloat16")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "capcli", "train")
    run = (sys.executable, *launch, "--config", place / "run.toml", *data, *thawing, *flags)
    env = environment(PYTHONWARNINGS="default", MPLCONFIGDIR=str(tmp_path / "fonts"))
    loud = subprocess.run([*map(str, run)], capture_output=True, text=True, check=False, env=env, timeout=100)
    assert (loud.returncode, loud.stdout) == (0, ""), loud.stderr
    lines = loud.stderr.splitlines()
    starts = ("11 images", "special tokens: ", "frozen: ", "step ", "  0")
    assert [line for line in lines if not line.startswith(starts) and "torch/distributed" not in line] == []
    assert len([line for line in lines if "left out: 1 broken" in line]) == 1
    assert [row["step"] for row in history(tmp_path / "out")] == ["1", "2", "3", "4"]


def test_quiet_says_nothing(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quiet = train(place, tmp_path / "quiet", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, b"", "")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model", "m", "--encoder", "e"),
        ("--encoder", "e"),
        ("--unfreeze-after", 3, "--model", "m"),
        ("--model", "m", "--select", "cider", "--caption-images", 0),
        ("--model", "m", "--resume", "--overwrite"),
        ("--model", "m", "--label-smoothing", "nan"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    code = "import sys; from capcli.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    wrong = ("train", "--data", "captions.txt", "--out", tmp_path / "out", *arguments)
    result = subprocess.run([sys.executable, "-c", code, *map(str, wrong)], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("capcli: --"), "an option is called as it is typed"
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
