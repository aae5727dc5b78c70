"""Training runs: dtype, schedule and freezing, what stops and what resumes them, damaged data, files and messages."""

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
from training import comparable, history, paint_data, recipe, weights

from capcli.training.data.pairs import Images
from capcli.training.loop.callbacks import ScheduleCallback


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and a recipe of six steps on nine of them."""
    place = tmp_path_factory.mktemp("training")
    recipe(place / "run.toml", paint_data(place / "pictures"))
    return place


@pytest.fixture(scope="module")
def six(place: Path) -> Path:
    """The run of six steps."""
    return succeeded(place, place / "six")


@pytest.fixture(autouse=True)
def undrawn() -> Iterator[None]:
    """Curves are drawn in the run that tests share; in the others they would take most of the time."""
    with mock.patch("capcli.training.loop.callbacks.draw_curves", return_value=None):
        yield


def train(place: Path, out: Path, *arguments: object) -> Ended:
    return call("train", "--config", place / "run.toml", "--out", out, *arguments)


def succeeded(place: Path, out: Path, *arguments: object) -> Path:
    result = train(place, out, *arguments)
    assert result.code == 0, result.err
    assert result.out == b""
    return out


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in history(folder) if row[name]]


def checkpoints(folder: Path) -> set[int]:
    return {int(name.split("-")[1]) for name in os.listdir(folder / "checkpoints")}


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Interrupts a run in it at this step, as a signal would."""
    original, state = ScheduleCallback.on_step_end, None

    def on_step_end(callback: ScheduleCallback, args: Any, current: Any, *others: Any, **objects: Any) -> Any:
        nonlocal state
        state = current
        return original(callback, args, current, *others, **objects)

    def stop_requested(_: ScheduleCallback, __: Any) -> bool:
        assert state is not None
        return state.global_step == step

    with mock.patch.multiple(ScheduleCallback, on_step_end=on_step_end, _stop_requested=stop_requested):
        yield


def left_out(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "data.failures.jsonl").read_text().splitlines()]


# How it learns


def test_checkpointed_gradients_are_the_same(place: Path, six: Path, tmp_path: Path) -> None:
    out = succeeded(place, tmp_path / "out", "--gradient-checkpointing")
    for name in ("loss", "grad_norm", "val_loss"):
        assert column(out, name) == pytest.approx(column(six, name), rel=1e-5)


def test_bfloat16_learns_about_the_same_and_is_saved_in_float32(place: Path, six: Path, tmp_path: Path) -> None:
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
def test_warmup_below_one_is_a_share_of_the_steps(place: Path, tmp_path: Path, schedule: str) -> None:
    arguments = ("--schedule", schedule, "--learning-rate", 0.01, "--warmup", 1 / 6, "--evaluate-every", 6)
    out = succeeded(place, tmp_path / "out", *arguments, "--caption-images", 0)
    rates = column(out, "learning_rate")
    assert rates[0] == 0
    if schedule not in ("inverse_sqrt", "polynomial"):  # which have further constants
        assert rates[1:] == pytest.approx([0.01 * share for share in RATES[schedule]])
    else:
        assert rates[1] == pytest.approx(0.01)
        assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_plateau_lowers_the_learning_rate(place: Path, tmp_path: Path) -> None:
    plateau = ("--schedule", "reduce_lr_on_plateau", "--evaluate-every", 1, "--max-steps", 13, "--caption-images", 0)
    out = succeeded(place, tmp_path / "out", *plateau, "--learning-rate", 1e-6)
    rates = column(out, "learning_rate")
    assert rates[0] == 1e-6
    assert rates[-1] == pytest.approx(1e-7)


# Freezing


def test_a_frozen_encoder_is_trained_after_its_step_also_when_resumed(place: Path, six: Path, tmp_path: Path) -> None:
    data = place / "pictures" / "captions.txt"
    (tmp_path / "run.toml").write_text(
        f'[train]\ndata = "{data}"\nval_fraction = 0.25\nmodel = "{six}"\nmax_steps = 6\nbatch_size = 4\n'
        'evaluate_every = 2\nkeep_best = 9\ncaption_images = 0\nlog_every = 1\nlearning_rate = 0.01\nfreeze = "encoder"\n'
        'unfreeze_after = 4\ndevice = "cpu"\nthreads = 1\nworkers = 0\n'
    )
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    result = call("train", "--config", tmp_path / "run.toml", "--out", unbroken)
    assert result.code == 0, result.err
    at = {step: load_file(unbroken / "checkpoints" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6)}
    before = load_file(six / "model.safetensors")
    encoder = [name for name in before if name.startswith("encoder.") and "pooler" not in name]
    for step, changed in ((2, False), (4, False), (6, True)):
        assert all(torch.equal(before[name], at[step][name]) != changed for name in encoder), step
    assert not torch.equal(before["decoder.transformer.wte.weight"], at[2]["decoder.transformer.wte.weight"])
    for step in (3, 5):
        with stopping_at(step):
            interrupted = call("train", "--config", tmp_path / "run.toml", "--out", broken, "--overwrite")
        assert "interrupted" in interrupted.err
        further = call("train", "--out", broken, "--resume")
        assert further.code == 0, further.err
        assert comparable(broken) == comparable(unbroken), step
        assert weights(broken) == weights(unbroken), step


# What ends it


def test_it_stops_early_without_improvement_and_is_then_finished(place: Path, tmp_path: Path) -> None:
    patient = ("--evaluate-every", 1, "--patience", 3, "--learning-rate", 1e-30)
    out = succeeded(place, tmp_path / "out", *patient)
    assert [row["step"] for row in history(out)] == ["1", "2", "3", "4"]
    assert checkpoints(out) == {1, 4}
    before = comparable(out), weights(out)
    again = call("train", "--out", out, "--resume")
    assert again.code == 0, again.err
    assert "finished" in again.err
    assert (comparable(out), weights(out)) == before
    further = call("train", "--out", out, "--resume", "--patience", 4)
    assert further.code == 0, further.err
    assert [row["step"] for row in history(out)] == ["1", "2", "3", "4", "5"]


def test_a_loss_that_is_not_finite_is_an_error(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "out", "--learning-rate", 1e30, "--max-grad-norm", 0)
    assert result.code == 1
    assert "the loss became nan before step" in result.err
    assert "--learning-rate" in result.err


def test_a_full_disk_is_one_error_and_the_run_resumes_from_a_complete_checkpoint(
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
    assert comparable(out) == comparable(six)
    assert weights(out) == weights(six)


def test_the_error_names_a_folder_that_cannot_be_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = train(place, tmp_path / "file" / "out")
    assert result.code == 1
    assert "cannot be written" in result.err
    assert str(tmp_path / "file") in result.err


# What it resumes from


def test_a_finished_run_can_get_more_steps(six: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(six, tmp_path / "out"))
    finished = call("train", "--out", out, "--resume")
    assert finished.code == 0, finished.err
    assert "finished" in finished.err
    assert comparable(out) == comparable(six)
    assert weights(out) == weights(six)
    record = [(out / name).read_bytes() for name in ("train.toml", "README.md", "run.json")]
    fewer = call("train", "--out", out, "--resume", "--max-steps", 3, "--select", "cider", "--log-every", 5)
    assert fewer.code == 0, fewer.err
    assert [(out / name).read_bytes() for name in ("train.toml", "README.md", "run.json")] == record
    assert weights(out) == weights(six)
    further = call("train", "--out", out, "--resume", "--max-steps", 8)
    assert further.code == 0, further.err
    assert "from step 6 the schedule ends at step 8 instead of 6" in further.err
    assert "At step 6 the run was resumed, to end at step 8 instead of 6." in (out / "README.md").read_text()
    assert comparable(out)[:6] == comparable(six)
    assert [row["step"] for row in history(out)] == [str(step) for step in range(1, 9)]


EPOCHS = ("--accumulation", 2, "--evaluate-every", "epoch", "--save-every", 2, "--log-every", 4, "--epochs", 3)
PLATEAU = ("--schedule", "reduce_lr_on_plateau", "--evaluate-every", 2, "--select", "cider", "--keep-best", 3)


def test_reports_and_evaluations_by_epoch(tmp_path: Path) -> None:
    """Nine images with two captions each, four at a time in updates of two: three updates, the last of one batch."""
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"))
    (tmp_path / "run.toml").write_text((tmp_path / "run.toml").read_text().replace("max_steps = 6\n", ""))
    out = succeeded(tmp_path, tmp_path / "out", *EPOCHS)
    assert all(row["loss"] for row in history(out))
    rows = [(row["step"], float(row["epoch"]), bool(row["val_loss"])) for row in history(out)]
    assert rows == [("3", 1, True), ("4", 1 + 2 / 5, False), ("6", 2, True), ("8", 2 + 4 / 5, False), ("9", 3, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "seed", "interruptions"),
    [
        (EPOCHS, 1, 2),
        (PLATEAU, 2, 2),
        (("--workers", 1, "--dtype", "bfloat16", "--max-steps", 7, "--evaluate-every", 7, "--caption-images", 0), 3, 1),
    ],
    ids=["epochs", "plateau", "workers"],
)
def test_wherever_it_is_interrupted_it_resumes_as_if_unbroken(
    tmp_path: Path, options: tuple[object, ...], seed: int, interruptions: int
) -> None:
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"))
    steps_line = "" if options is EPOCHS else "max_steps = 8\n"
    text = (tmp_path / "run.toml").read_text().replace("max_steps = 6\n", steps_line)
    (tmp_path / "run.toml").write_text(text)
    unbroken = succeeded(tmp_path, tmp_path / "unbroken", *options, "--seed", seed)
    out = tmp_path / "out"
    steps = random.Random(seed).sample(range(1, int(history(unbroken)[-1]["step"])), interruptions)
    for step in sorted(steps):
        with stopping_at(step):
            interrupted = train(tmp_path, out, *options, "--seed", seed, "--resume")
        assert "interrupted; --resume continues" in interrupted.err, interrupted.err
        assert step in checkpoints(out)
        assert (out / "model.safetensors").exists()
    further = call("train", "--out", out, "--resume")
    assert further.code == 0, further.err
    assert comparable(out) == comparable(unbroken), steps
    assert weights(out) == weights(unbroken), steps
    assert checkpoints(out) >= checkpoints(unbroken)


def test_other_data_is_refused(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=2)
    out = succeeded(tmp_path, tmp_path / "out")
    data.write_text(data.read_text().replace("on grey", "on gray"))
    result = call("train", "--out", out, "--resume", "--max-steps", 4)
    assert result.code == 1
    assert "the data has changed" in result.err
    assert "captions or image names differ" in result.err
    os.remove(data)
    assert call("train", "--out", out, "--resume", "--max-steps", 4).code == 2


def test_resume_starts_a_run_that_has_not_started(place: Path, six: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)  # as a run leaves it that is killed at once
    out = succeeded(place, tmp_path / "out", "--resume")
    assert weights(out) == weights(six)


# Validation


def test_without_validation_images_the_last_checkpoint_is_the_best(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    config = recipe(tmp_path / "run.toml", data, evaluate_every=2, keep_best=5)
    config.write_text(config.read_text().replace("val_fraction = 0.25\n", ""))
    out = tmp_path / "out"
    result = train(tmp_path, out)
    assert result.code == 0, result.err
    assert "no validation images" in result.err
    assert checkpoints(out) == {6}
    assert not column(out, "val_loss")
    assert weights(out) == weights(out / "checkpoints" / "checkpoint-6")
    for flags in (("--patience", 1), ("--schedule", "reduce_lr_on_plateau")):
        refused = train(tmp_path, tmp_path / "other", *flags)
        assert refused.code == 2
        assert flags[0].strip("-") in refused.err


def test_the_best_by_cider_are_kept(tmp_path: Path) -> None:
    """With so few images some captions are soon right: CIDEr goes up and down."""
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


@pytest.mark.parametrize("select", ["loss", "cider"])
def test_of_equal_evaluations_the_earlier_is_the_best(tmp_path: Path, select: str) -> None:
    """CIDEr of captions of one token is always 0, and with a learning rate of almost 0 the loss does not change either."""
    recipe(tmp_path / "run.toml", paint_data(tmp_path / "pictures"), evaluate_every=2)
    flags = ("--max-new-tokens", 1, "--select", select)
    still = train(tmp_path, tmp_path / "still", *flags, "--learning-rate", 1e-30)
    assert [line.split(":")[0] for line in still.err.splitlines() if "best so far" in line] == ["step 2/6"]
    assert checkpoints(tmp_path / "still") == {2, 6}
    learning = train(tmp_path, tmp_path / "learning", *flags)
    losses = column(tmp_path / "learning", "val_loss")
    assert losses == sorted(losses, reverse=True)
    assert learning.err.count("best so far") == 3
    assert checkpoints(tmp_path / "learning") == {6}


# Images that cannot be loaded any more


def test_an_image_that_breaks_is_left_out_and_reported_once(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=3)
    out = succeeded(tmp_path, tmp_path / "out")
    (tmp_path / "pictures" / "04.png").write_bytes(b"no picture")
    result = call("train", "--out", out, "--resume", "--max-steps", 12, "--evaluate-every", 100)
    assert result.code == 0, result.err
    assert result.err.count("04.png") == 1
    assert [each["file_name"] for each in left_out(out)] == ["04.png"]
    assert all(math.isfinite(loss) for loss in column(out, "loss"))
    again = call("train", "--out", out, "--resume", "--max-steps", 18)
    assert again.code == 0, again.err
    assert "04.png" not in again.err
    assert [each["file_name"] for each in left_out(out)] == ["04.png"]


def test_it_ends_when_no_image_can_be_loaded(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    recipe(tmp_path / "run.toml", data, max_steps=3)
    out = succeeded(tmp_path, tmp_path / "out")
    for name in os.listdir(tmp_path / "pictures"):
        if name.endswith(".png"):
            (tmp_path / "pictures" / name).write_bytes(b"no picture")
    result = call("train", "--out", out, "--resume", "--max-steps", 9)
    assert result.code == 1
    assert "could be loaded" in result.err
    assert sum(".png" in line for line in result.err.splitlines()) <= 5
    assert (out / "checkpoints" / "checkpoint-3" / "optimizer.pt").exists()


def test_a_resumed_run_leaves_out_the_same_images(tmp_path: Path) -> None:
    data = paint_data(tmp_path / "pictures")
    for name in ("03.png", "08.png"):
        (tmp_path / "pictures" / name).write_bytes(b"no picture")
    os.remove(tmp_path / "pictures" / "05.png")
    recipe(tmp_path / "run.toml", data, max_steps=4)
    unbroken = succeeded(tmp_path, tmp_path / "unbroken")
    assert sorted(each["file_name"] for each in left_out(unbroken)) == ["03.png", "05.png", "08.png"]
    out = succeeded(tmp_path, tmp_path / "out", "--max-steps", 3, "--schedule", "constant")
    further = call("train", "--out", out, "--resume", "--max-steps", 4)
    assert further.code == 0, further.err
    assert "1 missing, 2 broken" in further.err
    for name in ("03.png", "05.png", "08.png"):
        os.remove(tmp_path / "pictures" / name) if (tmp_path / "pictures" / name).exists() else None
    gone = call("train", "--out", out, "--resume", "--max-steps", 5)
    assert gone.code == 1


def test_a_killed_dataloader_worker_is_one_error(place: Path, tmp_path: Path) -> None:
    def killed(images: Images, index: int) -> Any:  # noqa: ARG001
        assert torch.utils.data.get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Images, "loaded", killed):
        result = train(place, tmp_path / "out", "--workers", 1)
    assert result.code == 1
    assert "a process that loads images was killed" in result.err
    assert "--workers 0" in result.err
    assert "--resume" in result.err


# Files and messages


def test_prepared_data_trains_the_same(place: Path, six: Path, tmp_path: Path) -> None:
    data = place / "pictures" / "captions.txt"
    done = call("prepare", "--data", data, "--val-fraction", 0.25, "--format", "png", "--out", tmp_path / "copy")
    assert done.code == 0, done.err
    text = (place / "run.toml").read_text().replace(str(data), str(tmp_path / "copy"))
    (tmp_path / "run.toml").write_text(text.replace("val_fraction = 0.25\n", ""))
    out = succeeded(tmp_path, tmp_path / "out")
    assert sorted(column(out, "val_loss")) == pytest.approx(sorted(column(six, "val_loss")), rel=0.2)
    assert len(comparable(out)) == len(comparable(six))


def test_tensorboard_has_the_curves(six: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(six / "tensorboard"))
    events.Reload()
    for tag, name in (
        ("training/loss", "loss"),
        ("training/learning_rate", "learning_rate"),
        ("validation/loss", "val_loss"),
        ("validation/CIDEr", "CIDEr"),
    ):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        rows = [(int(row["step"]), float(row[name])) for row in history(six) if row[name]]
        assert [step for step, _ in found] == [step for step, _ in rows]
        assert [value for _, value in found] == pytest.approx([value for _, value in rows], rel=1e-6)
    assert events.Tags()["tensors"]
    assert (six / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_its_settings_repeat_the_run(six: Path, tmp_path: Path) -> None:
    result = call("train", "--config", six / "train.toml", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert weights(tmp_path / "out") == weights(six)
    assert (tmp_path / "out" / "train.toml").read_bytes() == (six / "train.toml").read_bytes()


@pytest.mark.slow
def test_two_processes_write_only_the_lines_of_capcli_once(place: Path, six: Path, tmp_path: Path) -> None:
    """With options for which libraries print warnings; only the first process reports an image that cannot be used."""
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    (tmp_path / "pictures" / "03.png").write_bytes(b"no picture")
    data = ("--data", tmp_path / "pictures" / "captions.txt", "--model", six, "--batch-size", 2, "--max-steps", 4)
    freezing = ("--freeze", "encoder", "--unfreeze-after", 2, "--evaluate-every", 4, "--out", tmp_path / "out")
    flags = ("--gradient-checkpointing", "--workers", 1, "--dtype", "bfloat16")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "capcli", "train")
    run = (sys.executable, *launch, "--config", place / "run.toml", *data, *freezing, *flags)
    env = environment(PYTHONWARNINGS="default")
    ended = subprocess.run([*map(str, run)], capture_output=True, text=True, check=False, env=env, timeout=200)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
    lines = ended.stderr.splitlines()
    starts = ("11 images", "special tokens: ", "frozen: ", "step ", "  0")
    assert [line for line in lines if not line.startswith(starts) and "torch/distributed" not in line] == []
    assert len([line for line in lines if "left out: 1 broken" in line]) == 1
    assert [row["step"] for row in history(tmp_path / "out")] == ["1", "2", "3", "4"]


def test_quiet_writes_nothing(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
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
def test_wrong_usage_is_refused_before_torch_is_imported(tmp_path: Path, arguments: tuple[Any, ...]) -> None:
    code = "import sys; from capcli.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    wrong = ("train", "--data", "captions.txt", "--out", tmp_path / "out", *arguments)
    result = subprocess.run([sys.executable, "-c", code, *map(str, wrong)], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("capcli: --")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
