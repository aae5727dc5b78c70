"""The PyTorch runtime, the reference for all others.

On CUDA, steps are replayed from a CUDA graph, and the encoder runs concurrently on a second stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from capcli.decoding.loop import out_of_memory
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.errors import CapcliError
from capcli.runtimes.base import EncodedChunk, SlotRuntime

WARM_UPS = 2  # steps before the capture: libraries initialise in the first, which a capture does not allow


class Eager(SlotRuntime):
    """Runs a captioner's `encode` and `step` modules. `record`: whether steps on CUDA are replayed from a CUDA graph."""

    def __init__(
        self,
        encode: nn.Module,
        step: nn.Module,
        device: torch.device,
        *,
        prefixed: bool = False,
        record: bool = True,
        keep: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, prefixed=prefixed, keep=keep)
        self._encode_module, self._step_module = encode, step
        self.ahead = device.type == "cuda"
        self._record = record and self.ahead
        self._encode_stream: Any = torch.cuda.Stream(device) if self.ahead else None  # type: ignore[no-untyped-call]

    def replicas(self, count: int) -> Sequence[Eager]:
        if self.device.type != "cpu":
            return [self]
        modules, keep = (self._encode_module, self._step_module), self._keep
        return [self, *(Eager(*modules, self.device, prefixed=self.prefixed, keep=keep) for _ in range(1, count))]

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        super().allocate(shapes, settings)
        if self._encode_stream is not None:
            self._encode_stream.wait_stream(torch.cuda.current_stream(self.device))  # which loads the weights

    def encode(self, images: Sequence[Any], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:
        if self._encode_stream is None:
            return self._encoded(images, encoder_ids)
        with torch.cuda.stream(self._encode_stream):
            encoded = self._encoded(images, encoder_ids)
            return replace(encoded, done=self._encode_stream.record_event())

    def admit(self, encoded: EncodedChunk, slots: Sequence[int]) -> Tensor:
        if encoded.done is not None:
            steps = torch.cuda.current_stream(self.device)
            steps.wait_event(encoded.done)
            for tensor in (*encoded.keys_values, encoded.encoder_ids):
                tensor.record_stream(steps)  # its memory is not reused until this stream, too, has read it
        return self._admitted(encoded, slots)

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        """`step`, or on CUDA a CUDA graph of it: a step is hundreds of small kernels, which a graph starts in one launch."""
        return Recorded(step, self.device) if self._record else step

    def _encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Tensor) -> Sequence[Tensor]:
        image = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            image = image.pin_memory()  # otherwise the host waits for the copy
        image = image.to(self.device, non_blocking=True)
        text = (encoder_ids,) if encoder_ids.shape[1] else ()
        memory: tuple[Tensor, ...] = computed(self._encode_module, image, *text)
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
        logits: Tensor = computed(self._step_module, tokens, position, at, visible, memory, pool)
        return logits


def computed(module: nn.Module, *inputs: Any) -> Any:
    """The result of a module. Raises CapcliError where the model's settings make no sense; memory errors are not changed."""
    try:
        return module(*inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]  # torch appends the frames of its C++ code
        raise CapcliError(f"the model cannot be run ({reason}): its config.json may be damaged") from error


class Recorded:
    """Calls a function WARM_UPS times and then replays a CUDA graph of it. Its tensors must keep their addresses."""

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None and self._calls < WARM_UPS:
            self._step()
            self._calls += 1
            return
        with torch.cuda.device(self._device):
            self.graph = self.graph or self._captured()
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """The graph. A capture executes nothing: the first replay does."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may copy images to the device meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        return graph
