"""PyTorch: the runtime every other is held against. Eager on a CPU.

On CUDA steps are replayed from a CUDA graph, and the encoder runs beside them on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from capcli.decoding.loop import Shapes
from capcli.decoding.settings import Settings
from capcli.runtimes.base import EncodedChunk, SlotRuntime

WARM_UPS = 2  # turns before the recording: libraries set themselves up at the first, which no capture allows


class Eager(SlotRuntime):
    """Runs a captioner's `encode` and `step` modules. `record`: whether steps on CUDA become a CUDA graph."""

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
        self._aside: Any = torch.cuda.Stream(device) if self.ahead else None  # type: ignore[no-untyped-call]

    def beside(self, count: int) -> Sequence[Eager]:
        if self.device.type != "cpu":
            return [self]
        modules, keep = (self._encode_module, self._step_module), self._keep
        return [self, *(Eager(*modules, self.device, prefixed=self.prefixed, keep=keep) for _ in range(1, count))]

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        super().allocate(shapes, settings)
        if self._aside is not None:
            self._aside.wait_stream(torch.cuda.current_stream(self.device))  # what loads the weights

    def encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:
        if self._aside is None:
            return super().encode(pixels, encoder_ids)
        with torch.cuda.stream(self._aside):
            encoded = super().encode(pixels, encoder_ids)
            return replace(encoded, done=self._aside.record_event())

    def admit(self, encoded: EncodedChunk, seats: Sequence[int]) -> Tensor:
        if encoded.done is not None:
            steps = torch.cuda.current_stream(self.device)
            steps.wait_event(encoded.done)
            for each in (*encoded.seen, encoded.asked):
                each.record_stream(steps)  # the allocator keeps it until these, too, are done with it
        return super().admit(encoded, seats)

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        """`turn`, or on CUDA its recording: a step is hundreds of small kernels, and one launch starts them all."""
        return Recorded(turn, self.device) if self._record else turn

    def _encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Tensor) -> Sequence[Tensor]:
        image = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            image = image.pin_memory()  # only then does the host not wait for the copy
        image = image.to(self.device, non_blocking=True)
        memory: tuple[Tensor, ...] = self._encode_module(image, *((encoder_ids,) if encoder_ids.shape[1] else ()))
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
        logits: Tensor = self._step_module(tokens, position, at, visible, memory, pool)
        return logits


class Recorded:
    """Does a turn over tensors that stay where they are: as it is at first, then from its CUDA graph."""

    def __init__(self, turn: Callable[[], None], device: torch.device) -> None:
        self._turn, self._device = turn, device
        self._done = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is None and self._done < WARM_UPS:
            self._turn()
            self._done += 1
            return
        with torch.cuda.device(self._device):
            self.graph = self.graph or self._captured()
            self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Recording runs nothing: the turn is done by the first replay."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may upload images meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._turn()
        return graph
