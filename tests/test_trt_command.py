"""`capcli export --trt` and captions of its engines, with a stand-in for TensorRT whose plans ONNX Runtime runs on the CPU."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest
import torch
from exporting import cached_graphs
from running import Ended, call, paint, save_captioner

from capcli.engine.engine_json import Engine, Memory, write_engine
from capcli.errors import CapcliError
from capcli.export import tensorrt
from capcli.runtimes import trt
from capcli.runtimes.trt_plan import Plans

GPU = {"name": "A GPU", "capability": "9.0"}
UNFINISHED = Engine(
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


@pytest.fixture(scope="module", autouse=True)
def graph_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cached_graphs(tmp_path_factory):
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The stand-in for TensorRT, and a GPU, as the command sees them."""
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


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return content


def test_plans_give_the_captions_of_the_captioner(gpu: SimpleNamespace, tmp_path: Path) -> None:
    done = export(tmp_path, *SEARCH)
    assert done.code == 0, done.err
    assert "32 of 32 captions equal to PyTorch's in float32" in done.err
    content, files = content_of(tmp_path / "engine"), {path.name for path in (tmp_path / "engine").iterdir()}
    assert content["versions"] == {"tensorrt": gpu.__version__}
    assert content["gpu"] == GPU
    assert [bucket["slots"] for bucket in content["buckets"]] == [1, 4]
    assert content["parity"]["passed"]
    titles = [search["search"] for search in content["parity"]["searches"]]
    assert titles == ["2 beams, 1 slots", "2 beams, 4 slots"]
    assert {"step.onnx", "step.onnx.data", "step.trt.onnx", "encode.trt.onnx"} <= set(content["graphs"])
    assert not {name for name in files if ".onnx" in name}
    assert files == {*content["files"], "engine.json", "generation_config.json"}
    photos = paint(tmp_path / "photos", *(f"{n}.png" for n in range(5)))
    printed = re.search(r"capcli caption FOLDER --model (.*)", done.err)
    assert printed is not None
    search = ("--dtype", "float32", "--num-beams", 2, "--max-new-tokens", 7)
    for model, prompt in (
        (shlex.split(printed[1]), ()),
        ((tmp_path / "engine",), ("--prompt", "word20 word21 word22")),
    ):
        plans = caption(photos, *model, *prompt)
        assert plans.code == 0, plans.err
        captioner = caption(photos, tmp_path / "captioner", *search, *prompt)
        assert [row["text"] for row in plans.rows] == [row["text"] for row in captioner.rows]


def test_an_unfinished_engine_is_finished_without_its_captioner(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(tensorrt, "require_tensorrt", missing)
        done = export(tmp_path, *SEARCH, "--dtype", "float16")
    assert done.code == 1
    assert "TensorRT is missing" in done.err
    shutil.rmtree(tmp_path / "captioner")
    command = shlex.split(done.err.rpartition("this finishes the engine: capcli ")[2])
    for flag, value in (("--num-beams", 2), ("--batch-sizes", (1, 4)), ("--profile", "fused")):
        other = call(*command, flag, {"--num-beams": 4, "--batch-sizes": "1,2", "--profile": "portable"}[flag])
        assert other.code == 2
        assert f"{flag}: the graphs of {tmp_path / 'engine'} are for {value}" in other.err
    done = call(*command, "--threads", 1)
    assert done.code == 0, done.err
    assert "32 of 32 captions equal to its graphs' in ONNX Runtime" in done.err
    content = content_of(tmp_path / "engine")
    assert (content["dtype"], content["versions"]) == ("float16", {"tensorrt": gpu.__version__})
    captioned = caption(paint(tmp_path / "photos", "one.png", "two.png"), tmp_path / "engine")
    assert captioned.code == 0, captioned.err
    assert len(captioned.rows) == 2
    again = call("export", "--trt", "--model", tmp_path / "engine", "--out", tmp_path / "other")
    assert again.code == 2
    assert "is already an engine" in again.err


def test_without_a_gpu_the_error_names_it_first_and_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = export(tmp_path, *SEARCH)
    assert done.code == 1
    message = done.err.splitlines()[-1]
    assert message.startswith("capcli: there is no CUDA GPU here (")
    finish = f"this finishes the engine: capcli export --trt --model {tmp_path}/engine"
    assert message.endswith(f"on a machine with an NVIDIA GPU and TensorRT, {finish}")
    assert "pip install" not in done.err


@pytest.mark.slow
def test_an_unfinished_engine_is_replaced_and_one_in_bfloat16_needs_its_captioner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt, "require_tensorrt", missing)
    (tmp_path / "engine").mkdir()
    write_engine(str(tmp_path / "engine"), UNFINISHED)
    done = export(tmp_path, *SEARCH, "--dtype", "bfloat16", "--overwrite")
    assert done.code == 1
    assert (
        f"and the captioner, this finishes the engine: capcli export --trt --model {tmp_path / 'captioner'}" in done.err
    )
    assert content_of(tmp_path / "engine")["dtype"] == "bfloat16"
    assert {path.name for path in tmp_path.iterdir()} == {"captioner", "engine"}
    refused = call("export", "--trt", "--model", tmp_path / "engine")
    assert refused.code == 2
    assert "give the captioner" in refused.err
