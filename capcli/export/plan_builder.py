"""One graph -> one plan: all that uses `tensorrt` at build time. No torch.

As in `capcli.runtimes.trt_plan`, a test checks every use of TensorRT against tests/tensorrt_api.json; annotations give it
the types of variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import onnx

from capcli.errors import CapcliError
from capcli.runtimes.trt_plan import make_log
from capcli.storage import atomic

if TYPE_CHECKING:
    import tensorrt as trt


def build_plan(tensorrt: Any, graph: str, sizes: Mapping[str, int], timing_cache: str) -> bytes:
    """The plan of a graph file, with `sizes` for its named dimensions. Raises CapcliError with TensorRT's reason."""
    log = make_log(tensorrt)
    builder: trt.Builder = tensorrt.Builder(log)
    # Strongly typed: the graph gives the precision of each tensor.
    network: trt.INetworkDefinition = builder.create_network(
        1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    parser: trt.OnnxParser = tensorrt.OnnxParser(network, log)
    model = with_sizes(onnx.load(graph, load_external_data=False), sizes)
    if not parser.parse(model.SerializeToString(), os.path.abspath(graph)):  # the weights are in files beside it
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise CapcliError(f"TensorRT cannot read {graph}: {'; '.join(reasons) or log.last()}")
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # float32 products stay float32
    load_timings(config, timing_cache)
    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        raise CapcliError(f"TensorRT cannot build a plan of {graph} at {dict(sizes)}: {log.last()}")
    timings: trt.IHostMemory = config.get_timing_cache().serialize()
    with suppress(OSError):  # without the file the next build only takes longer
        os.makedirs(os.path.dirname(os.path.abspath(timing_cache)), exist_ok=True)
        atomic.replace(timing_cache, [bytes(memoryview(timings))])
    return bytes(memoryview(plan))


def load_timings(config: trt.IBuilderConfig, path: str) -> None:
    """Gives a build the timings of earlier builds; an empty cache where there are none of this TensorRT and GPU."""
    try:
        with open(path, "rb") as file:
            timings = file.read()
    except OSError:
        timings = b""
    cache: trt.ITimingCache = config.create_timing_cache(timings)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def with_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with `sizes` for its named dimensions: TensorRT's parser needs the static length of a cache.

    Raises ValueError for a named dimension of an input that `sizes` lacks.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for port in copy.graph.input:
        for size in port.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                if size.dim_param not in sizes:
                    raise ValueError(f"{port.name} has the dimension {size.dim_param}, whose size is not given")
                size.dim_value = sizes[size.dim_param]
    del copy.graph.value_info[:]  # it would contradict the new sizes
    for port in copy.graph.output:
        for size in port.type.tensor_type.shape.dim:
            if size.HasField("dim_param") and size.dim_param in sizes:
                size.dim_value = sizes[size.dim_param]
            elif size.HasField("dim_param"):
                size.ClearField("dim_param")
    return copy
