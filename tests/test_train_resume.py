"""A run that was killed or interrupted and goes on ends as if nothing had happened: history and weights, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from running import call, ended, spawn, wait_until
from training import MACHINE, history, paint_data, recipe, weights

from capcli.training.output.checkpoints import whole
from capcli.training.output.history import History

STEPS = 48


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Curves would take most of the time."""
    with mock.patch.object(History, "draw"):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports, evaluations and epochs end at different steps, so that something is always under way."""
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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_broken_run_goes_on_as_if_unbroken(config: Path, unbroken: Path, tmp_path: Path, number: int) -> None:
    out, checkpoints = tmp_path / "out", tmp_path / "out" / "checkpoints"
    process = spawn("train", "--config", config, "--out", out, env={"GOMP_SPINCOUNT": "0"})
    wait_until(lambda: bool(whole(str(checkpoints))), process)
    moment = random.SystemRandom().uniform(0, 0.4)
    time.sleep(moment)
    os.kill(process.pid, number)
    stopped = ended(process)
    reached = max(whole(str(checkpoints)))
    assert 0 < reached < STEPS, (moment, stopped.err)
    if number == signal.SIGKILL:
        assert stopped.code == -signal.SIGKILL, (moment, stopped.err)
        assert not (out / "model.safetensors").exists()
    else:
        assert stopped.code == 130, (moment, stopped.err)
        assert "--resume goes on" in stopped.err
        assert (out / "model.safetensors").exists()
    result = call("train", "--out", out, "--resume")
    assert result.code == 0, result.err
    assert f"going on from checkpoint-{reached}" in result.err
    assert same(out) == same(unbroken), moment
    assert weights(out) == weights(unbroken), moment


def same(folder: Path) -> list[dict[str, str]]:
    """history.csv but for what the machine has to do with."""
    return [{name: cell for name, cell in row.items() if name != MACHINE} for row in history(folder)]
