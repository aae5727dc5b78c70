"""Real TensorRT 8.6.0, the last whose wheel is complete, against PyTorch: portable graphs at opset 17, logits and time.

It wants an NVIDIA GPU and CPython 3.6 to 3.10, which capcli itself does not run on, so there are two halves:

    python tests/tensorrt_86.py prepare FOLDER              # in capcli's environment: graphs, inputs, what PyTorch says
    python3.10 -m venv trt86 && trt86/bin/pip install tensorrt==8.6.0 numpy onnx
    PYTHONPATH=. trt86/bin/python tests/tensorrt_86.py run FOLDER [--half]

`prepare --model CAPTIONER` takes a captioner's folder in place of a small random one.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

CHUNK, SLOTS, ROWS, ENTRIES = 4, 16, 4, 64
RUNS = 50
BOUND = {False: 1e-3, True: 5e-2}  # of the logits' spread, in float32 and in half precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half_to_run", choices=["prepare", "run"])
    parser.add_argument("folder")
    parser.add_argument("--model", help="a captioner's folder, to prepare")
    parser.add_argument("--half", action="store_true", help="let TensorRT compute in float16")
    given = parser.parse_args()
    if given.half_to_run == "prepare":
        prepare(Path(given.folder), *export(given.model))
        return
    from capcli.runtimes.trt_plan import import_tensorrt

    told = compare(Path(given.folder), import_tensorrt(least=(8, 6)), Cuda(), half=given.half)
    print(json.dumps(told, indent=2))
    sys.exit(any(each["distance"] > BOUND[given.half] for each in told.values()))


def export(folder: str | None) -> tuple[Any, Any, onnx.ModelProto, onnx.ModelProto]:
    """Encode and step, the modules and their portable graphs."""
    if folder is None:
        from exporting import exported

        made = exported("gpt2", "portable")
        return made.encode, made.step, made.encode_graph, made.step_graph
    import torch

    from capcli.export.graphs import encode_graph, step_graph
    from capcli.models.attention import use_attention
    from capcli.models.checkpoint import load_weights, modules, pixel_size
    from capcli.models.hub import find_model
    from capcli.pixels import PixelSpec

    files = find_model(folder, None, quiet=True)
    spec = PixelSpec.from_config(files.processor)
    whole = load_weights(files, "float32", torch.device("cpu"))
    encode, step = modules(whole, spec)
    first, memory = encode_graph(encode, pixel_size(files.name, whole.config.encoder, spec), "portable")
    second = step_graph(step, memory, torch.float32, "portable")
    use_attention(whole.decoder)
    return encode, step, first, second


def prepare(folder: Path, encode: Any, step: Any, first: onnx.ModelProto, second: onnx.ModelProto) -> None:
    """Both graphs of fixed shapes, inputs for them, and what PyTorch answers, in `folder`."""
    import torch

    from capcli.export.plan_builder import fixed
    from capcli.export.tensorrt import trt_ready

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"chunk": CHUNK, "slots": SLOTS, "rows": ROWS, "entries": ENTRIES}
    for graph, name in ((first, "encode"), (second, "step")):
        old = fixed(opset_17(trt_ready(graph)), sizes)
        path = folder / f"{name}.onnx"
        onnx.save(old, path, save_as_external_data=True, location=f"{name}.onnx.data")
        onnx.checker.check_model(path)
    draw = torch.Generator().manual_seed(0)
    size = [axis.dim_value for axis in first.graph.input[0].type.tensor_type.shape.dim[1:]]
    pixels = torch.randint(0, 256, (CHUNK, *size), dtype=torch.uint8, generator=draw)
    with torch.inference_mode():
        made = encode(pixels)
    names = [port.name.removeprefix("memory_") for port in first.graph.output]
    memory = [torch.randn(SLOTS, *x.shape[1:], generator=draw) for x in made]
    pool = [torch.randn(SLOTS, x.shape[1], ENTRIES, x.shape[3], generator=draw) for x in made]
    position = torch.randint(0, ENTRIES // ROWS, (SLOTS,), generator=draw, dtype=torch.int32)
    at = position * ROWS
    own = torch.arange(ENTRIES) == (at[:, None] + torch.arange(ROWS))[..., None]
    before = (torch.arange(ENTRIES) < at[:, None, None]) & (torch.rand(SLOTS, ROWS, ENTRIES, generator=draw) < 0.5)
    tokens = torch.randint(0, step.decoder.config.vocab_size, (SLOTS, ROWS), generator=draw, dtype=torch.int32)
    positions = position[:, None].expand(-1, ROWS).contiguous()
    given = {"tokens": tokens, "position": positions, "at": at, "visible": (own | before).int()}
    given |= {f"memory_{n}": x for n, x in zip(names, memory, strict=True)}
    given |= {f"pool_{n}": x.clone() for n, x in zip(names, pool, strict=True)}
    with torch.inference_mode():
        logits = step(tokens, positions, at, own | before, memory, pool)
    save(folder / "encode", {"pixels": pixels}, {f"memory_{n}": x for n, x in zip(names, made, strict=True)})
    after = {f"pool_out_{n}": x for n, x in zip(names, pool, strict=True)}  # a step writes into its pool
    save(folder / "step", given, {"logits": logits, **after})


def save(path: Path, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    np.savez(f"{path}.given.npz", **{name: x.numpy() for name, x in given.items()})
    np.savez(f"{path}.wanted.npz", **{name: x.numpy() for name, x in wanted.items()})


def opset_17(model: onnx.ModelProto) -> onnx.ModelProto:
    """A portable graph (opset 18) one opset older: onnx's own converter has no way down for Split.

    Raises ValueError for an operator that changed and is not known here.
    """
    old = onnx.ModelProto()
    old.CopyFrom(model)
    weights = {each.name: each for each in old.graph.initializer}
    for node in old.graph.node:
        if onnx.defs.get_schema(node.op_type, 18).since_version < 18:
            continue
        if node.op_type == "Split":
            keep(node, without=("num_outputs",))
        elif node.op_type.startswith("Reduce"):
            keep(node, without=("noop_with_empty_axes",))
            if len(node.input) > 1:
                axes = numpy_helper.to_array(weights[node.input.pop()])
                node.attribute.append(helper.make_attribute("axes", axes.tolist()))
        else:
            raise ValueError(f"{node.op_type} is not what it was at opset 17")
    old.opset_import[0].version = 17
    old.ir_version = 8
    return old


def keep(node: onnx.NodeProto, without: tuple[str, ...]) -> None:
    kept = [each for each in node.attribute if each.name not in without]
    del node.attribute[:]
    node.attribute.extend(kept)


def compare(folder: Path, tensorrt: Any, device: Any, *, half: bool = False) -> dict[str, dict[str, float]]:
    """Builds and runs both plans: how far from PyTorch's answers, in units of their spread, and milliseconds a run."""
    from capcli.export.plan_builder import build_plan
    from capcli.runtimes.trt_plan import Plans

    told = {}
    for name in ("encode", "step"):
        content = build_plan(tensorrt, str(folder / f"{name}.onnx"), {}, str(folder / "timings.cache"), half=half)
        (folder / f"{name}.plan").write_bytes(content)
        plan = Plans(tensorrt).load(str(folder / f"{name}.plan"))
        given, wanted = (dict(np.load(folder / f"{name}.{what}.npz")) for what in ("given", "wanted"))
        places = {n: device.put(np.ascontiguousarray(given.get(n, np.zeros_like(wanted.get(n))))) for n in plan.ports}
        for port, place in places.items():
            plan.bind(port, place)
        plan.run(device.stream)
        device.wait()
        apart = [distance(device.get(places[n], true), true) for n, true in wanted.items()]
        began = time.perf_counter()
        for _ in range(RUNS):
            plan.run(device.stream)
        device.wait()
        told[name] = {"distance": max(apart), "milliseconds": (time.perf_counter() - began) / RUNS * 1e3}
    return told


def distance(found: np.ndarray, true: np.ndarray) -> float:
    apart = float(np.abs(found - true).max() / true.std())
    return apart if apart == apart else float("inf")


class Cuda:
    """Arrays in a GPU's memory, through CUDA's runtime library alone."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(runtime_library())
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        self.stream = stream.value or 0

    def put(self, array: np.ndarray) -> int:
        place = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(place), ctypes.c_size_t(array.nbytes))
        self._copy(place.value, array.ctypes.data, array.nbytes, 1)
        return place.value or 0

    def get(self, place: int, like: np.ndarray) -> np.ndarray:
        array = np.empty_like(like)
        self._copy(array.ctypes.data, place, array.nbytes, 2)
        return array

    def wait(self) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def _copy(self, to: int | None, source: int, size: int, direction: int) -> None:
        self._call("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), direction)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} failed with CUDA's error {status}")


def runtime_library() -> str:
    """libcudart of the wheel that TensorRT's brings along, or the system's."""
    beside = [glob.glob(os.path.join(p, "nvidia", "cuda_runtime", "lib", "libcudart.so.*")) for p in sys.path]
    return next((found[0] for found in beside if found), "libcudart.so.12")


if __name__ == "__main__":
    main()
