"""The script for TensorRT 8.6: its graphs, inputs and comparison, with plans that ONNX Runtime executes on the CPU."""

from __future__ import annotations

from pathlib import Path

import fake_tensorrt
import numpy as np
import onnx
import pytest
import tensorrt_86


class Host:
    """In place of a GPU: arrays stay where they are."""

    stream = 0

    def __init__(self) -> None:
        self.arrays: dict[int, np.ndarray] = {}

    def put(self, array: np.ndarray) -> int:
        self.arrays[array.ctypes.data] = array
        return array.ctypes.data

    def get(self, place: int, like: np.ndarray) -> np.ndarray:
        return self.arrays[place].reshape(like.shape)

    def wait(self) -> None:
        """Everything has happened already."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("86")
    tensorrt_86.prepare(folder, *tensorrt_86.export(None))
    return folder


def test_graphs_of_opset_17_say_what_pytorch_says(prepared, monkeypatch):
    for name in ("encode", "step"):
        model = onnx.load(prepared / f"{name}.onnx")
        assert model.opset_import[0].version == 17
        onnx.checker.check_model(model, full_check=True)
    monkeypatch.setattr(tensorrt_86, "RUNS", 1)
    told = tensorrt_86.compare(prepared, fake_tensorrt.make(in_place=False), Host())
    assert told["encode"]["distance"] < 1e-4
    assert told["step"]["distance"] < 1e-4
    given = dict(np.load(prepared / "step.given.npz"))
    np.savez(prepared / "step.given.npz", **{**given, "visible": np.ones_like(given["visible"])})
    told = tensorrt_86.compare(prepared, fake_tensorrt.make(in_place=False), Host())
    assert told["step"]["distance"] > 1e-2, "what rows see makes no difference"


def test_an_operator_that_changed_is_refused(prepared):
    model = onnx.load(prepared / "step.onnx")
    model.graph.node.append(onnx.helper.make_node("Pad", ["logits", "p"], ["y"]))
    with pytest.raises(ValueError, match="Pad is not what it was"):
        tensorrt_86.opset_17(model)
