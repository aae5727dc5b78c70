"""`capcli export --trt` and captioning with what it builds, with a TensorRT whose plans ONNX Runtime executes on the CPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest
import torch
from running import Ended, call, paint, save_captioner

from capcli.engine.engine_json import Engine, Memory, write_engine
from capcli.errors import CapcliError
from capcli.export import tensorrt
from capcli.runtimes import trt
from capcli.runtimes.trt_plan import Plans

GPU = {"name": "A GPU", "capability": "9.0"}
WAITING = Engine(
    kind="tensorrt",
    profile="fused",
    opset=24,
    dtype="float32",
    quantize=None,
    captioner={},
    pixels=(32, 32),
    memory=Memory(1, 4, 17, 12),
    positions=64,
    vocabulary=120,
    command=("capcli", "export", "--trt"),
    capcli="0",
)
SEARCH = ("--num-beams", 2, "--max-new-tokens", 7, "--batch-sizes", "1,4")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with TensorRT and a GPU, as far as this command can tell."""
    module = fake_tensorrt.make()

    def open_trt(folder: str, engine: Engine, _: torch.device) -> trt.Trt:
        trt.refuse_misfit(folder, engine, {"tensorrt": module.__version__}, GPU)
        plans = Plans(module)
        return trt.Trt(engine, lambda name: plans.load(os.path.join(folder, name)), torch.device("cpu"))

    monkeypatch.setattr(tensorrt, "require_tensorrt", lambda: module)
    monkeypatch.setattr(trt, "this_gpu", lambda _: GPU)
    monkeypatch.setattr(trt, "open_trt", open_trt)
    return module


def missing() -> None:
    raise CapcliError("TensorRT is missing")


def export(place: Path, *flags: object) -> Ended:
    if not (place / "captioner").exists():
        save_captioner(place / "captioner", n_layer=1, generation={"max_length": 20, "num_beams": 3})
    return call("export", "--trt", "--threads", 1, "--model", place / "captioner", "--out", place / "engine", *flags)


def caption(photos: Path, model: object, *flags: object) -> Ended:
    return call("caption", photos, "--model", model, "--workers", 0, "--threads", 1, "-o", "-", *flags)


def known(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return told


def test_plans_are_built_proved_and_caption_as_the_captioner_does(gpu: SimpleNamespace, tmp_path: Path) -> None:
    done = export(tmp_path, *SEARCH)
    assert done.code == 0, done.err
    assert "32 of 32 captions equal to PyTorch's in float32" in done.err
    told, there = known(tmp_path / "engine"), {path.name for path in (tmp_path / "engine").iterdir()}
    assert told["versions"] == {"tensorrt": gpu.__version__}
    assert told["gpu"] == GPU
    assert [bucket["slots"] for bucket in told["buckets"]] == [1, 4]
    assert told["proof"]["passed"]
    assert [each["search"] for each in told["proof"]["said"]] == ["2 beams, 1 slots", "2 beams, 4 slots"]
    assert {"step.onnx", "step.onnx.data", "step.trt.onnx", "encode.trt.onnx"} <= set(told["graphs"])
    assert not {name for name in there if ".onnx" in name}
    assert there == {*told["files"], "engine.json", "generation_config.json"}
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    printed = re.search(r"capcli caption FOLDER --model (.*)", done.err)
    assert printed is not None
    ours = caption(photos, *shlex.split(printed[1]))
    assert ours.code == 0, ours.err
    theirs = caption(photos, tmp_path / "captioner", "--dtype", "float32", "--num-beams", 2, "--max-new-tokens", 7)
    assert [row["text"] for row in ours.rows] == [row["text"] for row in theirs.rows]
    prompt = ("--prompt", "word20 word21 word22")
    ours = caption(photos, tmp_path / "engine", *prompt)
    assert ours.code == 0, ours.err
    searched = ("--dtype", "float32", "--num-beams", 2, "--max-new-tokens", 7)
    theirs = caption(photos, tmp_path / "captioner", *searched, *prompt)
    assert [row["text"] for row in ours.rows] == [row["text"] for row in theirs.rows]


def test_an_engine_left_without_tensorrt_is_finished_without_its_captioner(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(tensorrt, "require_tensorrt", missing)
        left = export(tmp_path, *SEARCH, "--dtype", "float16")
    assert left.code == 1
    assert "TensorRT is missing" in left.err
    shutil.rmtree(tmp_path / "captioner")
    command = shlex.split(left.err.rpartition("this finishes it: capcli ")[2])
    for flag, own in (("--num-beams", 2), ("--batch-sizes", (1, 4)), ("--profile", "fused")):
        other = call(*command, flag, {"--num-beams": 4, "--batch-sizes": "1,2", "--profile": "portable"}[flag])
        assert other.code == 2
        assert f"{flag}: {tmp_path / 'engine'} was left to be built for {own}" in other.err
    done = call(*command, "--threads", 1)
    assert done.code == 0, done.err
    assert "32 of 32 captions equal to its graphs' in ONNX Runtime" in done.err
    told = known(tmp_path / "engine")
    assert (told["dtype"], told["versions"]) == ("float16", {"tensorrt": gpu.__version__})
    ours = caption(paint(tmp_path / "photos", "one.png", "two.png"), tmp_path / "engine")
    assert ours.code == 0, ours.err
    assert len(ours.rows) == 2
    again = call("export", "--trt", "--model", tmp_path / "engine", "--out", tmp_path / "other")
    assert again.code == 2
    assert "is an engine already" in again.err


def test_a_machine_without_a_gpu_is_told_so_first_and_no_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    left = export(tmp_path, *SEARCH)
    assert left.code == 1
    told = left.err.splitlines()[-1]
    assert told.startswith("capcli: there is no CUDA GPU here (")
    finish = (
        f"on a machine with an NVIDIA GPU and TensorRT, this finishes it: capcli export --trt --model {tmp_path}/engine"
    )
    assert told.endswith(finish)
    assert "pip install" not in left.err


def test_an_unfinished_engine_is_replaced_and_one_of_bfloat16_wants_the_captioner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "require_tensorrt", missing)
    (tmp_path / "engine").mkdir()
    write_engine(str(tmp_path / "engine"), WAITING)
    left = export(tmp_path, *SEARCH, "--dtype", "bfloat16", "--overwrite")
    assert left.code == 1
    assert f"and the captioner, this finishes it: capcli export --trt --model {tmp_path / 'captioner'}" in left.err
    assert known(tmp_path / "engine")["dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"captioner", "engine"}
    refused = call("export", "--trt", "--model", tmp_path / "engine")
    assert refused.code == 2
    assert "give the captioner" in refused.err
