"""ONNX Runtime, on CPU or CUDA: the graphs of an engine folder over PyTorch's own buffers, nothing copied between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from capcli.runtimes.seated import Seated

# ONNX's numbers for the types that graphs here take and give (onnx.proto, TensorProto.DataType).
NUMBER = {torch.float32: 1, torch.uint8: 2, torch.int32: 6, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}


class Ort(Seated):
    """Runs two sessions; memory, pool and logits are bound once for all steps of a run, the pool in place."""

    def __init__(self, encode: str, step: str, device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
        super().__init__(device)
        self._encoder, self._decoder = session(encode, device), session(step, device)
        self._dtype, self._vocabulary = dtype, vocabulary
        self._layers = [node.name.removeprefix("memory_") for node in self._encoder.get_outputs()]
        self._shape = [node.shape[1:] for node in self._encoder.get_outputs()]
        self._bound: tuple[Any, ...] = ()

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Sequence[Tensor]:
        image = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, non_blocking=True)
        memory = [image.new_empty(len(image), *shape, dtype=self._dtype) for shape in self._shape]
        names = [f"memory_{name}" for name in self._layers]
        self._run(self._encoder, bind(self._encoder, {"pixels": image}, dict(zip(names, memory, strict=True))))
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
        _, given, logits, binding = self._bound
        for name, value in zip(("tokens", "position", "at", "visible"), (tokens, position, at, visible), strict=True):
            given[name].copy_(value)
        self._run(self._decoder, binding)
        return logits

    def _bind_step(
        self, tokens: Tensor, visible: Tensor, memory: Sequence[Tensor], pool: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor], Tensor, Any]:
        given = {name: torch.empty_like(tokens, dtype=torch.int32) for name in ("tokens", "position")}
        given |= {"at": given["tokens"].new_empty(len(tokens)), "visible": torch.empty_like(visible)}
        logits = torch.empty(*tokens.shape, self._vocabulary, dtype=self._dtype, device=self.device)
        given = {name: value.contiguous() for name, value in given.items()}
        kept = {f"memory_{name}": x for name, x in zip(self._layers, memory, strict=True)}
        before = {f"pool_{name}": x for name, x in zip(self._layers, pool, strict=True)}
        after = {f"pool_out_{name}": x for name, x in zip(self._layers, pool, strict=True)}
        return given, logits, bind(self._decoder, {**given, **kept, **before}, {"logits": logits, **after})

    def _run(self, session: Any, binding: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # its kernels run on a stream of its own
        session.run_with_iobinding(binding)


def session(path: str, device: torch.device) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0, "use_tf32": "0"})]
    return onnxruntime.InferenceSession(path, options, providers=providers)


def bind(session: Any, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
    """Binds contiguous tensors as they lie; one that is input and output is written in place."""
    binding = session.io_binding()
    for name, x in inputs.items():
        binding.bind_input(name, x.device.type, x.device.index or 0, NUMBER[x.dtype], tuple(x.shape), x.data_ptr())
    for name, x in outputs.items():
        binding.bind_output(name, x.device.type, x.device.index or 0, NUMBER[x.dtype], tuple(x.shape), x.data_ptr())
    return binding
