"""Checkpoints that are damaged, incomplete or of another run, and two runs in one folder: named, never used silently."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from running import Ended, call, wait_until
from safetensors.torch import load_file
from training import comparable, exit_code, paint_data, recipe, start_training, weights

from capcli.training.output.checkpoints import complete, find_damage
from capcli.training.output.events import EventFile
from capcli.training.output.folder import flat


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Curves would take most of the time."""
    with mock.patch("capcli.training.loop.callbacks.draw_curves", return_value=None):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in `done`, whose checkpoint of step 3 can still be resumed."""
    place = tmp_path_factory.mktemp("checkpoints")
    recipe(place / "run.toml", paint_data(place / "pictures"), caption_images=0)
    with mock.patch("capcli.training.loop.callbacks.prune"):
        assert train(place, place / "done").code == 0
    return place


@pytest.fixture
def out(place: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(place / "done", tmp_path / "out"))


def train(place: Path, out: Path, *arguments: object) -> Ended:
    return call("train", "--config", place / "run.toml", "--out", out, *arguments)


def resume(out: Path) -> Ended:
    return call("train", "--out", out, "--resume")


def changed(path: Path) -> None:
    """Changes the last byte of a file."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": os.remove,
    "changed": changed,
}
DAMAGED = [
    ("optimizer.pt", "empty"),
    ("optimizer.pt", "changed"),
    ("rng_state.pth", "torn"),
    ("scheduler.pt", "missing"),
    ("model.safetensors", "torn"),
    ("trainer_state.json", "torn"),
    ("capcli.json", "torn"),
    ("capcli.json", "missing"),
]


def without_files(checkpoint: Path) -> None:
    """Makes the manifest of a checkpoint one of an earlier version."""
    path = checkpoint / "capcli.json"
    path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in ("step", "processes", "report")}))


@pytest.mark.parametrize(("name", "damage"), DAMAGED)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_resumed(
    place: Path, out: Path, name: str, damage: str
) -> None:
    DAMAGES[damage](out / "checkpoints" / "checkpoint-6" / name)
    result = resume(out)
    assert result.code == 0, result.err
    assert f"{name}" in next(line for line in result.err.splitlines() if line.startswith("passed over checkpoint-6: "))
    assert "resuming from checkpoint-3" in result.err
    assert weights(out) == weights(place / "done")
    assert comparable(out) == comparable(place / "done")
    assert find_damage(str(out / "checkpoints" / "checkpoint-6"), resumed=True) is None


@pytest.mark.parametrize(
    ("name", "damage"), [case for case in DAMAGED if case[1] != "changed" and "capcli" not in case[0]]
)
def test_checkpoints_of_an_earlier_version_are_checked_by_their_formats(out: Path, name: str, damage: str) -> None:
    shutil.rmtree(out / "checkpoints" / "checkpoint-3")
    without_files(out / "checkpoints" / "checkpoint-6")
    facts = json.loads((out / "run.json").read_text())
    del facts["run"]
    (out / "run.json").write_text(json.dumps(facts))
    assert find_damage(str(out / "checkpoints" / "checkpoint-6"), resumed=True) is None
    DAMAGES[damage](out / "checkpoints" / "checkpoint-6" / name)
    result = resume(out)
    assert result.code == 1
    assert len(result.err.splitlines()) == 1
    assert f"checkpoint-6: {name} is " in result.err


def test_a_checkpoint_of_another_run_is_refused(place: Path, out: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "other", "--seed", 7, "--max-steps", 9, "--evaluate-every", 9).code == 0
    shutil.copytree(tmp_path / "other" / "checkpoints" / "checkpoint-9", out / "checkpoints" / "checkpoint-9")
    result = resume(out)
    assert result.code == 2
    assert "checkpoint-9 was written by another run: move it out of this folder" in result.err
    shutil.rmtree(out / "checkpoints" / "checkpoint-9")
    (out / "checkpoints" / "checkpoint-6").rename(out / "checkpoints" / "checkpoint-9")
    assert "passed over checkpoint-9: it is that of step 6" in resume(out).err


def test_the_best_weights_are_whole(out: Path) -> None:
    (out / "checkpoints" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    facts = json.loads((out / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in facts["log_history"] if "eval_loss" in entry] == [3, 6]
    changed(out / "checkpoints" / "checkpoint-6" / "config.json")
    result = resume(out)
    assert result.code == 1
    assert "checkpoint-6: config.json is damaged" in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
@pytest.mark.parametrize("link", [False, True])
def test_a_second_run_in_a_folder_is_refused(place: Path, tmp_path: Path, link: bool) -> None:
    out, second = tmp_path / "out", tmp_path / "second"
    with open(tmp_path / "stderr", "wb") as stderr:
        process = start_training(
            "--config", place / "run.toml", "--out", out, "--max-steps", 60, stderr=stderr.fileno()
        )
    wait_until(lambda: bool(complete(str(out / "checkpoints"))), process)
    second.symlink_to(out) if link else second.mkdir()
    for arguments in (("--overwrite",), ("--resume",)):
        if not link:
            shutil.copy(out / "run.json", second)
            (second / "checkpoints").unlink(missing_ok=True)
            (second / "checkpoints").symlink_to(out / "checkpoints")
        result = train(place, second, "--max-steps", 60, *arguments)
        assert result.code == 1, result.err
        assert "another run is training in " in result.err
    assert exit_code(process) == 0, (tmp_path / "stderr").read_text()
    assert complete(str(out / "checkpoints"))[60]


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [("train.toml", None, 2), ("train.toml", "[", 2), ("run.json", "{", 2), ("run.json", "[]", 2)],
)
def test_a_damaged_record_of_the_run_is_named(
    place: Path, out: Path, name: str, content: str | None, code: int
) -> None:
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_text(content)
    for result in (resume(out), train(place, out, "--resume")):
        assert result.code in (1, code), result.err
        assert len(result.err.splitlines()) == 1
        assert name in result.err
        assert "unexpected" not in result.err


def test_weights_that_are_not_finite_are_not_saved(place: Path, tmp_path: Path) -> None:
    flags = ("--learning-rate", 1e30, "--max-grad-norm", 0, "--save-every", 1, "--evaluate-every", 6, "--log-every", 6)
    result = train(place, tmp_path / "out", *flags)
    assert result.code == 1
    assert "--learning-rate" in result.err
    for path in complete(str(tmp_path / "out" / "checkpoints")).values():
        assert all(weight.isfinite().all() for weight in load_file(f"{path}/model.safetensors").values())


def test_events_on_a_full_disk_are_a_warning_and_whole(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warnings: list[str] = []
    events = EventFile(str(tmp_path), warn=warnings.append)
    events.add_scalar("loss", 1.0, 1)
    [path] = tmp_path.iterdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        for step in (2, 3):
            events.add_scalar("loss", 1.0, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(warnings) == 1
    assert "cannot be written (File too large); training continues" in warnings[0]
    events.add_scalar("loss", 1.0, 4)
    events.add_text("caption", "\udcff", 4)
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 4]


def test_settings_keep_the_order_of_their_file() -> None:
    """The order of sets differs from process to process."""
    names = [f"name{number}" for number in range(50)]
    sections = {f"section {name}": {name: 0} for name in names} | {"task": [{"name": "caption"}]}
    assert list(flat(sections)) == [*names, "task"]
