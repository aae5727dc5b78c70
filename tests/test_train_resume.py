"""A run that is killed or interrupted and then resumed ends with the same history and weights, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from running import call
from training import PATIENCE, comparable, exit_code, history, paint_data, recipe, start_training, weights

from capcli.training.output.checkpoints import complete

STEPS = 48


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Curves would take most of the time."""
    with mock.patch("capcli.training.loop.callbacks.draw_curves", return_value=None):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports, evaluations and epochs end at different steps, so that one of them is always incomplete."""
    place = tmp_path_factory.mktemp("resume")
    return recipe(
        place / "run.toml", paint_data(place / "pictures"), max_steps=STEPS, evaluate_every=6, log_every=4, keep_best=2
    )


@pytest.fixture(scope="module")
def unbroken(config: Path) -> Path:
    out = config.parent / "unbroken"
    result = call("train", "--config", config, "--out", out)
    assert result.code == 0, result.err
    assert history(out)[-1]["step"] == str(STEPS)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_broken_run_resumes_as_if_unbroken(config: Path, unbroken: Path, tmp_path: Path, number: int) -> None:
    out, checkpoints = tmp_path / "out", str(tmp_path / "out" / "checkpoints")
    with open(tmp_path / "stderr", "wb") as stderr:
        process = start_training("--config", config, "--out", out, stderr=stderr.fileno())
    deadline = time.monotonic() + PATIENCE
    while not complete(checkpoints):
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    moment = random.SystemRandom().uniform(0, 0.4)
    time.sleep(moment)
    os.kill(process.pid, number)
    code, messages = exit_code(process), (tmp_path / "stderr").read_text()
    reached = max(complete(checkpoints))
    assert 0 < reached < STEPS, (moment, messages)
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL, (moment, messages)
        assert not (out / "model.safetensors").exists()
    else:
        assert code == 130, (moment, messages)
        assert "--resume continues" in messages
        assert (out / "model.safetensors").exists()
    result = call("train", "--out", out, "--resume")
    assert result.code == 0, result.err
    assert f"resuming from checkpoint-{reached}" in result.err
    assert comparable(out) == comparable(unbroken), moment
    assert weights(out) == weights(unbroken), moment
