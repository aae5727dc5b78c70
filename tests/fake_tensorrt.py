"""A stand-in for TensorRT: its plans contain the ONNX graph, which ONNX Runtime runs on the CPU over the bound pointers.

It checks what the real one requires: shapes are static, every tensor is bound, an output that is written in place has its
input's address, and any other output shares memory with no other tensor.
"""

from __future__ import annotations

import os
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from tensorrt_uses import API

VERSION = "10.15.1.29"
ENUMS: Any = SimpleNamespace(
    **{name: IntEnum(name, what["enum"], start=0) for name, what in API[VERSION].items() if "enum" in what}
)
KINDS = {
    TensorProto.FLOAT: (ENUMS.DataType.FLOAT, np.float32),
    TensorProto.FLOAT16: (ENUMS.DataType.HALF, np.float16),
    TensorProto.INT32: (ENUMS.DataType.INT32, np.int32),
    TensorProto.UINT8: (ENUMS.DataType.UINT8, np.uint8),
}
IN_PLACE, COPYING = b"a plan that writes in place\n", b"a plan that does not\n"
FOREIGN_TIMINGS = b"of another version"  # the real one refuses timings of another version or GPU


class ILogger:
    Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError


class INetworkDefinition:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()


class ParserError:
    def __init__(self, text: str) -> None:
        self.text = text

    def desc(self) -> str:
        return self.text


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self.network, self.logger, self.errors = network, logger, []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self.errors[index])

    def parse(self, model: bytes, path: str | None = None) -> bool:
        parsed = onnx.ModelProto.FromString(model)
        for port in parsed.graph.input:
            if not all(size.dim_value for size in port.type.tensor_type.shape.dim):
                self.errors.append(f"{port.name} has no static shape")
        for node in parsed.graph.node:
            if node.op_type == "MatMulInteger":
                self.errors.append("no importer for MatMulInteger")
        if path is not None and not self.errors:
            onnx.load_external_data_for_model(parsed, os.path.dirname(path))
        self.network.model = parsed
        return not self.errors


class ITimingCache:
    def __init__(self, timings: bytes) -> None:
        self.timings = timings

    def serialize(self) -> bytes:
        return self.timings + b"."


class IBuilderConfig:
    def __init__(self) -> None:
        self.flags_set = {ENUMS.BuilderFlag.TF32}
        self.cache: ITimingCache | None = None

    def clear_flag(self, flag: Any) -> None:
        self.flags_set.remove(flag)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return None if serialized_timing_cache == FOREIGN_TIMINGS else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not ignore_mismatch

    def get_timing_cache(self) -> ITimingCache | None:
        return self.cache


class Builder:
    mark = IN_PLACE

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << ENUMS.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        assert ENUMS.BuilderFlag.TF32 not in config.flags_set
        assert config.cache is not None
        if any(node.op_type == "Det" for node in network.model.graph.node):
            self.logger.log(ILogger.Severity.ERROR, "no kernel was found")
            return None
        return self.mark + network.model.SerializeToString()


class ICudaEngine:
    def __init__(self, model: onnx.ModelProto, in_place: bool, logger: ILogger) -> None:
        caches = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "TensorScatter"}
        self.caches, self.logger = caches if in_place else {}, logger
        for node in model.graph.node:
            kept = [item for item in node.attribute if item.name != "TRT_decomposable"]  # ONNX Runtime refuses it
            del node.attribute[:]
            node.attribute.extend(kept)
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        graph = onnx.shape_inference.infer_shapes(model).graph
        self.inputs = {port.name for port in graph.input}
        tensors = {port.name: port.type.tensor_type for port in (*graph.input, *graph.output)}
        self.shapes = {name: tuple(size.dim_value for size in x.shape.dim) for name, x in tensors.items()}
        self.kinds = {name: KINDS[x.elem_type] for name, x in tensors.items()}

    @property
    def num_io_tensors(self) -> int:
        return len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return list(self.shapes)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def get_tensor_dtype(self, name: str) -> Any:
        return self.kinds[name][0]

    def get_tensor_mode(self, name: str) -> Any:
        return ENUMS.TensorIOMode.INPUT if name in self.inputs else ENUMS.TensorIOMode.OUTPUT

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.caches.get(name)

    def create_execution_context(self) -> IExecutionContext:
        return IExecutionContext(self)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self.plan, self.bound = engine, dict[str, int]()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.plan.shapes:
            self.plan.logger.log(ILogger.Severity.ERROR, f"there is no tensor {name}")
            return False
        self.bound[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert isinstance(stream_handle, int)
        plan = self.plan
        if wrong := self._wrong():
            plan.logger.log(ILogger.Severity.ERROR, wrong)
            return False
        binding = plan.session.io_binding()
        for name, pointer in self.bound.items():
            bind = binding.bind_input if name in plan.inputs else binding.bind_output
            bind(name, "cpu", 0, plan.kinds[name][1], plan.shapes[name], pointer)
        plan.session.run_with_iobinding(binding)
        return True

    def _wrong(self) -> str | None:
        """What the real one would report, or silently overwrite; None for a correct binding."""
        plan = self.plan
        if free := sorted(set(plan.shapes) - set(self.bound)):
            return f"not bound: {free}"
        ranges = {name: range(at, at + size_of(plan, name)) for name, at in self.bound.items()}
        for name in set(plan.shapes) - plan.inputs:
            source = plan.get_aliased_input_tensor(name)
            if source and self.bound[source] != self.bound[name]:
                return f"{name} is not where {source} is"
            for other in set(ranges) - {name, source}:
                if ranges[other].start < ranges[name].stop and ranges[name].start < ranges[other].stop:
                    return f"{name} and {other} share memory"
        return None


def size_of(plan: ICudaEngine, name: str) -> int:
    return int(np.prod(plan.shapes[name])) * np.dtype(plan.kinds[name][1]).itemsize


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        for mark in (IN_PLACE, COPYING):
            if serialized_engine.startswith(mark):
                model = onnx.ModelProto.FromString(serialized_engine.removeprefix(mark))
                return ICudaEngine(model, mark == IN_PLACE, self.logger)
        self.logger.log(ILogger.Severity.ERROR, "the plan's version does not match")
        return None


FAKES = (
    ILogger,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    ITimingCache,
    IBuilderConfig,
    Builder,
    ICudaEngine,
    IExecutionContext,
    Runtime,
)


def make(*, in_place: bool = True) -> Any:
    """The module. `in_place`: whether its plans write the result of a TensorScatter over its cache."""
    classes = {fake.__name__: fake for fake in FAKES}
    classes["Builder"] = type("Builder", (Builder,), {"mark": IN_PLACE if in_place else COPYING})
    return SimpleNamespace(__version__=VERSION, **vars(ENUMS), **classes)
