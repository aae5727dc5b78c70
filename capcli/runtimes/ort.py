"""The ONNX Runtime runtime: an engine's graphs on CPU or CUDA, bound to PyTorch's tensors so that steps copy nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capcli.engine.check import refuse_misfit
from capcli.engine.engine_json import ENCODE, STEP, Engine
from capcli.engine.packages import FUSED, ONNXRUNTIME, importing_runtime, release
from capcli.errors import CapcliError
from capcli.models.dtypes import DTYPES
from capcli.models.model_files import ENGINE
from capcli.runtimes.base import SlotRuntime

# The element types of the graphs' inputs and outputs (TensorProto.DataType in onnx.proto).
NUMBER = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}


def open_ort(folder: str, engine: Engine, device: torch.device) -> Ort:
    """The runtime of an engine folder.

    Raises CapcliError when ONNX Runtime is missing, of another version than the engine's, or cannot run the engine here.
    """
    onnxruntime = import_onnxruntime()
    refuse_misfit(folder, engine, {"onnxruntime": onnxruntime.__version__}, None)
    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise CapcliError(
            "this ONNX Runtime has no CUDA: pip install onnxruntime-gpu in place of onnxruntime, or give --device cpu"
        )
    if device.type == "cpu" and engine.dtype == "bfloat16":
        raise CapcliError(
            f"ONNX Runtime computes in bfloat16 on CUDA only, and the engine {folder} is bfloat16: export float32"
        )
    encode, step = (session(os.path.join(folder, name), device) for name in (ENCODE, STEP))
    return Ort(encode, step, engine, device)


def own_device(device: torch.device) -> torch.device:
    """The device for `--device auto`: the CPU where this ONNX Runtime has no CUDA, else `device`."""
    has_cuda = "CUDAExecutionProvider" in import_onnxruntime().get_available_providers()
    return device if has_cuda else torch.device("cpu")


def import_onnxruntime(profile: str = "portable") -> Any:
    """ONNX Runtime's module. Raises CapcliError when it is missing, cannot be loaded, or lacks a profile's operators."""
    with importing_runtime(ONNXRUNTIME):
        import onnxruntime
    version: str = onnxruntime.__version__
    if profile == "fused" and release(version) < FUSED:
        least = ".".join(map(str, FUSED))
        raise CapcliError(
            f"ONNX Runtime {version} is too old for --profile fused: {least} or newer is needed "
            f"({ONNXRUNTIME.install} --upgrade), or give --profile portable"
        )
    return onnxruntime


class Ort(SlotRuntime):
    """Runs two sessions. Memory, pool and logits are bound once for all steps of a run; the pool is written in place."""

    def __init__(self, encode: Any, step: Any, engine: Engine, device: torch.device) -> None:
        super().__init__(device, prefixed=engine.memory.prefixed)
        self._encoder, self._decoder = encode, step
        self._dtype, self._vocabulary = DTYPES[engine.dtype], engine.vocabulary
        memory = engine.memory
        self._layers = memory.names
        self._shape, self._reads_text = (memory.heads, memory.positions, memory.head_size), memory.reads_question
        self._bound: tuple[Any, ...] = ()

    def _encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Tensor) -> Sequence[Tensor]:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, non_blocking=True)
        inputs = {"pixels": image} | ({"question": encoder_ids.int()} if self._reads_text else {})
        heads, entries, head_size = self._shape
        shape = (len(image), heads, entries + (encoder_ids.shape[1] if self._reads_text else 0), head_size)
        memory = [image.new_empty(shape, dtype=self._dtype) for _ in self._layers]
        names = [f"memory_{name}" for name in self._layers]
        self._run(self._encoder, bind(self._encoder, inputs, dict(zip(names, memory, strict=True))))
        return memory

    def _run_step(
        self,
        tokens: Tensor,
        position: Tensor,
        at: Tensor,
        visible: Tensor,
        memory: Sequence[Tensor],
        pool: Sequence[Tensor],
    ) -> Tensor:
        known = (tokens.shape, visible.shape, *(x.data_ptr() for x in (*memory, *pool)))
        if not self._bound or self._bound[0] != known:
            self._bound = (known, *self._bind_step(tokens, visible, memory, pool))
        inputs, binding = self._bound[1], self._bound[3]
        logits: Tensor = self._bound[2]
        for name, value in zip(("tokens", "position", "at", "visible"), (tokens, position, at, visible), strict=True):
            inputs[name].copy_(value)
        self._run(self._decoder, binding)
        return logits

    def _bind_step(
        self, tokens: Tensor, visible: Tensor, memory: Sequence[Tensor], pool: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Any]:
        """The buffers of a step's inputs, that of its logits, and their binding together with memory and pool."""
        inputs = {name: torch.empty_like(tokens, dtype=torch.int32) for name in ("tokens", "position")}
        inputs |= {"at": inputs["tokens"].new_empty(len(tokens)), "visible": torch.empty_like(visible)}
        logits = torch.empty(*tokens.shape, self._vocabulary, dtype=self._dtype, device=self.device)
        inputs = {name: value.contiguous() for name, value in inputs.items()}
        # not strict: there is no memory where images are prefixes
        read = {f"memory_{name}": x for name, x in zip(self._layers, memory, strict=False)}
        before = {f"pool_{name}": x for name, x in zip(self._layers, pool, strict=True)}
        after = {f"pool_out_{name}": x for name, x in zip(self._layers, pool, strict=True)}
        return inputs, logits, bind(self._decoder, {**inputs, **read, **before}, {"logits": logits, **after})

    def _run(self, session: Any, binding: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime uses another stream
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            if "Failed to allocate memory" in str(error):
                raise MemoryError(str(error)) from error
            raise CapcliError(f"ONNX Runtime failed: {str(error).strip().partition(chr(10))[0]}") from error


def session(path: str, device: torch.device) -> Any:
    """An InferenceSession of a graph. Raises CapcliError where it cannot be loaded."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between steps the search needs the cores
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": "0"})]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        reason = str(error).strip().partition("\n")[0]
        raise CapcliError(f"ONNX Runtime cannot load {path}: {reason}") from error


def bind(session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
    """Binds contiguous tensors without a copy; a tensor that is both input and output is written in place.

    Raises CapcliError for a tensor that the graph does not have.
    """
    assert all(x.is_contiguous() for x in (*inputs.values(), *outputs.values()))
    binding = session.io_binding()
    try:
        for name, x in inputs.items():
            binding.bind_input(name, x.device.type, x.device.index or 0, NUMBER[x.dtype], tuple(x.shape), x.data_ptr())
        for name, x in outputs.items():
            binding.bind_output(name, x.device.type, x.device.index or 0, NUMBER[x.dtype], tuple(x.shape), x.data_ptr())
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise CapcliError(f"the engine's graphs do not fit its {ENGINE} ({error}): export it again") from error
    return binding
