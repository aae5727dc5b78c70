"""One graph -> one plan: all that touches `tensorrt` at build time. It knows no torch, and runs on Python 3.10 too.

As in `capcli.runtimes.trt_plan`, tests/tensorrt_api.json says what TensorRT has, and annotations what a variable is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import onnx

from capcli.errors import CapcliError
from capcli.runtimes.trt_plan import make_log

if TYPE_CHECKING:
    import tensorrt as trt


def build_plan(tensorrt: Any, graph: str, sizes: Mapping[str, int], timing_cache: str, *, half: bool = False) -> bytes:
    """One plan, of these sizes. `half` is for TensorRT 8, where precision is the builder's choice and not the graph's.

    Raises CapcliError with TensorRT's own reason.
    """
    log = make_log(tensorrt)
    builder: trt.Builder = tensorrt.Builder(log)
    network: trt.INetworkDefinition = builder.create_network(network_flags(tensorrt))
    parser: trt.OnnxParser = tensorrt.OnnxParser(network, log)
    model = fixed(onnx.load(graph, load_external_data=False), sizes)
    if not parser.parse(model.SerializeToString(), os.path.abspath(graph)):  # weights lie beside it
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise CapcliError(f"TensorRT cannot read {graph}: {'; '.join(reasons) or log.last()}")
    config: trt.IBuilderConfig = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # float32 is to be float32
    if half and hasattr(tensorrt.BuilderFlag, "FP16"):
        config.set_flag(tensorrt.BuilderFlag.FP16)
    give_timings(config, timing_cache)
    plan: trt.IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        raise CapcliError(f"TensorRT cannot build a plan of {graph} at {dict(sizes)}: {log.last()}")
    measured: trt.IHostMemory = config.get_timing_cache().serialize()
    with suppress(OSError):  # the next build measures again
        os.makedirs(os.path.dirname(os.path.abspath(timing_cache)), exist_ok=True)
        with open(f"{timing_cache}.tmp", "wb") as file:
            file.write(memoryview(measured))
        os.replace(f"{timing_cache}.tmp", timing_cache)
    return bytes(memoryview(plan))


def network_flags(tensorrt: Any) -> int:
    """Strongly typed: the graph says what each tensor's precision is. TensorRT 8 knows nothing of it."""
    flag = tensorrt.NetworkDefinitionCreationFlag
    if hasattr(flag, "STRONGLY_TYPED"):
        return 1 << int(flag.STRONGLY_TYPED)
    if hasattr(flag, "EXPLICIT_BATCH"):
        return 1 << int(flag.EXPLICIT_BATCH)
    return 0


def give_timings(config: trt.IBuilderConfig, path: str) -> None:
    """Lets a build begin with what was measured before; with nothing where another TensorRT or GPU measured it."""
    try:
        with open(path, "rb") as file:
            known = file.read()
    except OSError:
        known = b""
    cache: trt.ITimingCache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def fixed(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """A copy whose inputs have these sizes in place of named ones: TensorRT wants a cache of static length as it parses.

    Raises ValueError for a size that is not given.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for port in copy.graph.input:
        for size in port.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                if size.dim_param not in sizes:
                    raise ValueError(f"{port.name} has a size {size.dim_param} that is not given")
                size.dim_value = sizes[size.dim_param]
    del copy.graph.value_info[:]  # they would contradict
    for port in copy.graph.output:
        for size in port.type.tensor_type.shape.dim:
            if size.HasField("dim_param") and size.dim_param in sizes:
                size.dim_value = sizes[size.dim_param]
            elif size.HasField("dim_param"):
                size.ClearField("dim_param")
    return copy
