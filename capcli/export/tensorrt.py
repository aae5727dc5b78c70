"""ONNX graphs -> TensorRT plans: a copy of each graph that TensorRT's parser takes, and a plan for every bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from capcli.decoding.shapes import Shapes
from capcli.engine.engine_json import ENCODE, STEP, Bucket, encode_plan, hash_files, plan_files, step_plan
from capcli.errors import CapcliError
from capcli.export.parser_rules import DECOMPOSABLE, casts_to_float, has, lint
from capcli.export.plan_builder import build_plan
from capcli.runtimes.trt_plan import import_tensorrt
from capcli.storage import atomic

READY = ".trt.onnx"


def trt_ready(model: onnx.ModelProto | str) -> onnx.ModelProto:
    """A copy for TensorRT only (ONNX Runtime rejects it), without what `lint` reports of exported graphs.

    Attention may be decomposed; float64 becomes float32; bool inputs become int32; shapes of uint8 inputs are read after
    their cast. Weights in files beside the graph stay there.
    """
    ready = onnx.ModelProto()
    ready.CopyFrom(onnx.load(model, load_external_data=False) if isinstance(model, str) else model)
    folder = os.path.dirname(model) if isinstance(model, str) else ""
    for node in ready.graph.node:
        if node.op_type == "Attention" and not has(node, DECOMPOSABLE):
            node.attribute.append(helper.make_attribute(DECOMPOSABLE, 1))
        elif node.op_type == "Split" and has(node, "num_outputs") and len(node.input) > 1 and node.input[1]:
            drop(node, "num_outputs")
    to_float(ready.graph, folder)
    bools_to_int(ready.graph)
    shapes_after_cast(ready.graph)
    return ready


def to_float(graph: onnx.GraphProto, folder: str) -> None:
    """Changes float64 to float32 in weights, constants, casts and value types."""
    for weight in graph.initializer:
        if weight.data_type == TensorProto.DOUBLE:
            weight.CopyFrom(as_float32(weight, folder))
    for node in graph.node:
        for item in node.attribute:
            if item.name in ("to", "dtype") and item.i == TensorProto.DOUBLE:
                item.i = TensorProto.FLOAT
            elif item.HasField("t") and item.t.data_type == TensorProto.DOUBLE:
                item.t.CopyFrom(as_float32(item.t, folder))
    for port in (*graph.input, *graph.output, *graph.value_info):
        if port.type.tensor_type.elem_type == TensorProto.DOUBLE:
            port.type.tensor_type.elem_type = TensorProto.FLOAT


def as_float32(weight: onnx.TensorProto, folder: str) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(weight, folder).astype(np.float32), weight.name)


def bools_to_int(graph: onnx.GraphProto) -> None:
    for port in graph.input:
        if port.type.tensor_type.elem_type == TensorProto.BOOL:
            port.type.tensor_type.elem_type = TensorProto.INT32
            cast = f"{port.name}_bool"
            for node in graph.node:
                node.input[:] = [cast if name == port.name else name for name in node.input]
            graph.node.insert(0, helper.make_node("Cast", [port.name], [cast], cast, to=TensorProto.BOOL))


def shapes_after_cast(graph: onnx.GraphProto) -> None:
    """Makes the cast of a uint8 input its only reader: nodes that need its shape read the shape of the cast."""
    for port in graph.input:
        if port.type.tensor_type.elem_type == TensorProto.UINT8:
            cast = next((n for n in graph.node if casts_to_float(n) and n.input[0] == port.name), None)
            if cast is None:
                continue
            for node in graph.node:
                if node.op_type == "Shape" and node.input[0] == port.name:
                    node.input[0] = cast.output[0]
            at = list(graph.node).index(cast)
            moved = onnx.NodeProto()
            moved.CopyFrom(cast)
            del graph.node[at]
            graph.node.insert(0, moved)


def ready_name(graph: str) -> str:
    """The file name of a graph's copy for TensorRT."""
    return graph.removesuffix(".onnx") + READY


def write_ready(folder: str, graphs: Iterable[str]) -> list[str]:
    """Writes copies of graph files for TensorRT beside them, which share their weights; returns the names of the copies.

    Raises CapcliError, with what `lint` reports, for a graph that TensorRT would refuse.
    """
    names = []
    for graph in graphs:
        path = os.path.join(folder, graph)
        ready = trt_ready(path)
        lines = lint(ready)
        if lines:
            more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
            raise CapcliError(f"TensorRT would reject {path}: {'; '.join(lines[:3])}{more}")
        names.append(ready_name(graph))
        atomic.replace(os.path.join(folder, names[-1]), [ready.SerializeToString()])
    return names


def make_buckets(batch_sizes: Iterable[int], rows: int, entries: int) -> tuple[Bucket, ...]:
    """A bucket for each batch size, which encodes as many images at a time as a run of that size does."""
    return tuple(Bucket(slots, Shapes.of(slots).chunk, rows, entries) for slots in sorted(set(batch_sizes)))


def require_tensorrt() -> Any:
    """TensorRT's module. Raises CapcliError where plans cannot be built: there is no GPU, or no TensorRT."""
    import torch

    if not torch.cuda.is_available():
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        also = "" if has_tensorrt() else ", nor a TensorRT that can be imported"
        raise CapcliError(
            f"there is no CUDA GPU here ({why}){also}; plans are built on the NVIDIA GPU that they will run on"
        )
    return import_tensorrt()


def has_tensorrt() -> bool:
    try:
        import_tensorrt()
    except CapcliError:
        return False
    return True


def build_plans(
    folder: str,
    buckets: Sequence[Bucket],
    *,
    timing_cache: str,
    graphs: tuple[str, str] = (ENCODE, STEP),
    note: Callable[[str], None] = lambda _: None,
    tensorrt: Any = None,
) -> dict[str, str]:
    """Builds the plans of all buckets from the copies for TensorRT of `graphs` in `folder`; returns their SHA-256 by name.

    Every plan has fixed shapes. TensorRT's timings are kept in the file `timing_cache` and make the next build faster.
    Raises CapcliError where TensorRT or a GPU is missing, or TensorRT fails.
    """
    module = tensorrt or require_tensorrt()
    encode, step = (os.path.join(folder, ready_name(name)) for name in graphs)
    built: set[str] = set()
    for bucket in buckets:
        sizes = {"slots": bucket.slots, "rows": bucket.rows, "entries": bucket.entries}
        for name, graph, shape in (
            (encode_plan(bucket.chunk), encode, {"chunk": bucket.chunk}),
            (step_plan(bucket), step, sizes),
        ):
            if name in built:
                continue
            note(f"building {name}")
            plan = build_plan(module, graph, shape, timing_cache)
            try:
                atomic.replace(os.path.join(folder, name), [plan])
            except OSError as error:
                raise CapcliError(f"{os.path.join(folder, name)} cannot be written: {error.strerror}") from error
            built.add(name)
    return hash_files(folder, plan_files(buckets))


def timing_cache_path(folder: str, version: str, gpu: Mapping[str, str]) -> str:
    """The file of TensorRT's timings that the engines beside `folder` share; one for each version and GPU."""
    name = "-".join(("timings", version, *gpu.values())).replace(" ", "_").replace("/", "_")
    return os.path.join(os.path.dirname(os.path.abspath(folder)), f"{name}.cache")


def drop(node: onnx.NodeProto, name: str) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
