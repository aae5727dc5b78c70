"""TensorRT's own API at run time: reads plans, binds them to device pointers and runs them on a CUDA stream. No torch.

Every attribute of TensorRT used here is checked against tests/tensorrt_api.json; one that some version lacks is guarded by
`hasattr`. Variables that refer to TensorRT's objects are annotated, so that the check can follow them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capcli.engine.packages import KEEPS, TENSORRT, importing_runtime, release
from capcli.errors import CapcliError

if TYPE_CHECKING:
    import tensorrt as trt


def import_tensorrt() -> Any:
    """TensorRT's module. Raises CapcliError when it is missing, cannot be imported, or is older than KEEPS."""
    with importing_runtime(TENSORRT):
        import tensorrt
    version: str = tensorrt.__version__
    if release(version) < KEEPS:
        wanted = f"{KEEPS[0]}.{KEEPS[1]} or newer is needed ({TENSORRT.install} --upgrade)"
        raise CapcliError(f"TensorRT {version} is too old: {wanted}")
    return tensorrt


def make_log(tensorrt: Any) -> Any:
    """A logger that collects TensorRT's error messages in `complaints`; `last()` is the reason for a call that failed."""

    class Log(tensorrt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR):
                self.complaints.append(msg)

        def last(self) -> str:
            return self.complaints[-1] if self.complaints else "TensorRT gave no reason"

    return Log()


@dataclass(frozen=True, slots=True)
class Port:
    """A plan's input or output: its shape, and its type by NumPy's name, or `bfloat16`."""

    shape: tuple[int, ...]
    dtype: str
    is_input: bool


class Plan:
    """A loaded plan with one execution context: bind every port to a device pointer, then run."""

    def __init__(self, engine: trt.ICudaEngine, log: Any, ports: Mapping[str, Port], name: str) -> None:
        self._engine, self._log, self.ports, self.name = engine, log, ports, name
        context: trt.IExecutionContext = engine.create_execution_context()
        if context is None:
            raise MemoryError(f"{name}: not enough memory to run it: {log.last()}")
        self._context: trt.IExecutionContext = context

    def aliased(self, output: str) -> str | None:
        """The input that this output overwrites in place, whose buffer it must share; None: it needs another buffer."""
        engine: trt.ICudaEngine = self._engine
        if not hasattr(engine, "get_aliased_input_tensor"):
            return None
        return engine.get_aliased_input_tensor(output) or None

    def bind(self, name: str, pointer: int) -> None:
        """Binds a port to the device pointer of a contiguous array of its shape and type."""
        if not self._context.set_tensor_address(name, pointer):
            raise RuntimeError(f"{self.name}: {name} cannot be bound: {self._log.last()}")

    def run(self, stream: int) -> None:
        """Enqueues one run on a CUDA stream and does not wait for it."""
        if not self._context.execute_async_v3(stream):
            raise RuntimeError(f"{self.name} cannot be run: {self._log.last()}")


class Plans:
    """Reads plans from files."""

    def __init__(self, tensorrt: Any) -> None:
        self._tensorrt, self._log = tensorrt, make_log(tensorrt)
        self._runtime: trt.Runtime = tensorrt.Runtime(self._log)

    def load(self, path: str) -> Plan:
        """The plan of a file. Raises CapcliError where it cannot be read or is not a plan for this TensorRT and GPU."""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise CapcliError(f"{path} cannot be read: {error.strerror}") from error
        engine: trt.ICudaEngine = self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise CapcliError(f"TensorRT cannot load {path}: {self._log.last()}")
        return Plan(engine, self._log, self._ports(engine), path)

    def _ports(self, engine: trt.ICudaEngine) -> dict[str, Port]:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        types = type_names(self._tensorrt)
        return {
            name: Port(
                tuple(engine.get_tensor_shape(name)),
                types.get(engine.get_tensor_dtype(name), "another type"),
                engine.get_tensor_mode(name) == self._tensorrt.TensorIOMode.INPUT,
            )
            for name in names
        }


def type_names(tensorrt: Any) -> dict[Any, str]:
    kind = tensorrt.DataType
    known = {kind.FLOAT: "float32", kind.HALF: "float16", kind.INT32: "int32", kind.UINT8: "uint8", kind.BOOL: "bool"}
    if hasattr(kind, "BF16"):
        known[kind.BF16] = "bfloat16"
    return known
