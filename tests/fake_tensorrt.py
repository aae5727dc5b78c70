"""TensorRT without TensorRT: its plans hold the ONNX graph, which ONNX Runtime executes on the CPU over the pointers bound.

It is as strict as the real one where capcli could go wrong: shapes are static, every port is bound, an output that is written
in place has its input's address, and any other output shares memory with nothing.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from tensorrt_uses import API

MARK = b"a fake plan\n"


def make(*, in_place: bool = True, version: str = "10.15.1.29") -> SimpleNamespace:
    """The module. `in_place`: whether its plans write the results of TensorScatter over its caches."""
    enums = {name: IntEnum(name, what["enum"], start=0) for name, what in API[version].items() if "enum" in what}
    DataType, TensorIOMode, BuilderFlag = (enums[name] for name in ("DataType", "TensorIOMode", "BuilderFlag"))  # noqa: N806
    kinds = {
        TensorProto.FLOAT: (DataType.FLOAT, np.float32),
        TensorProto.FLOAT16: (DataType.HALF, np.float16),
        TensorProto.INT32: (DataType.INT32, np.int32),
        TensorProto.UINT8: (DataType.UINT8, np.uint8),
    }

    class Logger:
        """`ILogger`"""

        Severity = IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)

        def log(self, severity: Any, msg: str) -> None:
            raise NotImplementedError

    class Network:
        """`INetworkDefinition`"""

        _model: onnx.ModelProto | None = None

    class Error:
        """`ParserError`"""

        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

    class OnnxParser:
        def __init__(self, network: Network, logger: Logger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> Error:
            return Error(self._errors[index])

        def parse(self, model: bytes, path: str | None = None) -> bool:
            parsed = onnx.ModelProto.FromString(model)
            for port in parsed.graph.input:
                if not all(size.dim_value for size in port.type.tensor_type.shape.dim):
                    self._errors.append(f"{port.name} has no static shape")
            for node in parsed.graph.node:
                if node.op_type in ("DynamicQuantizeLinear", "MatMulInteger"):
                    self._errors.append(f"no importer for {node.op_type}")
            if path is not None and not self._errors:
                onnx.load_external_data_for_model(parsed, path.rpartition("/")[0])
            self._network._model = parsed
            return not self._errors

    class Cache:
        """`ITimingCache`"""

        def __init__(self, known: bytes) -> None:
            self._known = known

        def serialize(self) -> bytes:
            return self._known + b"."

    class Config:
        """`IBuilderConfig`"""

        def __init__(self) -> None:
            self._flags = {BuilderFlag.TF32}

        def clear_flag(self, flag: Any) -> None:
            self._flags.remove(flag)

        def set_flag(self, flag: Any) -> None:
            self._flags.add(flag)

        def create_timing_cache(self, serialized_timing_cache: bytes) -> Cache | None:
            return None if serialized_timing_cache.startswith(b"of another") else Cache(serialized_timing_cache)

        def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
            return not ignore_mismatch

    class Builder:
        def __init__(self, logger: Logger) -> None:
            self._logger = logger

        def create_network(self, flags: int = 0) -> Network:
            assert flags == 1 << enums["NetworkDefinitionCreationFlag"].STRONGLY_TYPED
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
            assert BuilderFlag.TF32 not in config._flags
            if any(node.op_type == "Det" for node in network._model.graph.node):
                self._logger.log(Logger.Severity.ERROR, "no kernel was found")
                return None
            return MARK + network._model.SerializeToString()

    class Context:
        """`IExecutionContext`"""

        def __init__(self, engine: Engine) -> None:
            self._engine, self._bound, self._runs = engine, {}, 0

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if name not in self._engine._ports:
                return False
            self._bound[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine = self._engine
            wrong = self._wrong()
            if wrong:
                engine._logger.log(Logger.Severity.ERROR, wrong)
                return False
            binding = engine._session.io_binding()
            for name, pointer in self._bound.items():
                bind = binding.bind_input if name in engine._inputs else binding.bind_output
                bind(name, "cpu", 0, kinds[engine._kinds[name]][1], engine._ports[name], pointer)
            engine._session.run_with_iobinding(binding)
            self._runs += 1
            return True

        def _wrong(self) -> str | None:
            """What the real one reports, or would silently overwrite."""
            engine = self._engine
            free = set(engine._ports) - set(self._bound)
            if free:
                return f"not bound: {sorted(free)}"
            places = {name: range(at, at + engine._bytes(name)) for name, at in self._bound.items()}
            for name in set(engine._ports) - engine._inputs:
                source = engine.get_aliased_input_tensor(name)
                if source and self._bound[source] != self._bound[name]:
                    return f"{name} is not where {source} is"
                for other, place in places.items():
                    if (
                        other not in (name, source)
                        and place.start < places[name].stop
                        and places[name].start < place.stop
                    ):
                        return f"{name} and {other} share memory"
            return None

    class Engine:
        """`ICudaEngine`"""

        def __init__(self, content: bytes, logger: Logger) -> None:
            model = onnx.ModelProto.FromString(content)
            caches = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "TensorScatter"}
            self._caches = caches if in_place else {}
            for node in model.graph.node:
                kept = [each for each in node.attribute if each.name != "TRT_decomposable"]  # not ONNX Runtime's
                del node.attribute[:]
                node.attribute.extend(kept)
            self._inputs = {port.name for port in model.graph.input}
            ports = (*model.graph.input, *model.graph.output)
            self._kinds = {p.name: p.type.tensor_type.elem_type for p in ports}
            options = onnxruntime.SessionOptions()
            options.log_severity_level, options.intra_op_num_threads = 3, 1
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            inferred = onnx.shape_inference.infer_shapes(model)
            ports = (*inferred.graph.input, *inferred.graph.output)
            self._ports = {p.name: tuple(d.dim_value for d in p.type.tensor_type.shape.dim) for p in ports}
            self._logger = logger

        @property
        def num_io_tensors(self) -> int:
            return len(self._ports)

        def get_tensor_name(self, index: int) -> str:
            return list(self._ports)[index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._ports[name]

        def get_tensor_dtype(self, name: str) -> Any:
            return kinds[self._kinds[name]][0]

        def get_tensor_mode(self, name: str) -> Any:
            return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

        def get_aliased_input_tensor(self, name: str) -> str | None:
            return self._caches.get(name)

        def create_execution_context(self, strategy: Any = None) -> Context:
            return Context(self)

        def _bytes(self, name: str) -> int:
            return int(np.prod(self._ports[name])) * np.dtype(kinds[self._kinds[name]][1]).itemsize

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            if not serialized_engine.startswith(MARK):
                self._logger.log(Logger.Severity.ERROR, "the plan's version does not match")
                return None
            return Engine(serialized_engine.removeprefix(MARK), self._logger)

    return SimpleNamespace(
        __version__=version,
        ILogger=Logger,
        OnnxParser=OnnxParser,
        Builder=Builder,
        Runtime=Runtime,
        ICudaEngine=Engine,
        IExecutionContext=Context,
        IBuilderConfig=Config,
        ITimingCache=Cache,
        ParserError=Error,
        **enums,
    )
