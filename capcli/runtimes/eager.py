"""PyTorch: the runtime every other is held against. Eager on a CPU; on CUDA its steps are replayed from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from capcli.runtimes.seated import Seated

WARM_UPS = 2  # turns before the recording: libraries set themselves up at the first, which no capture allows


class Eager(Seated):
    """Runs a captioner's `encode` and `step` modules. `record`: whether steps on CUDA become a CUDA graph."""

    def __init__(
        self,
        encode: nn.Module,
        step: nn.Module,
        device: torch.device,
        *,
        prefixed: bool = False,
        record: bool = True,
    ) -> None:
        super().__init__(device, prefixed=prefixed)
        self._encode_module, self._step_module = encode, step
        self._record = record and device.type == "cuda"

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        """`turn`, or on CUDA its recording: a step is hundreds of small kernels, and one launch starts them all."""
        return Recorded(turn, self.device) if self._record else turn

    def _encode(self, pixels: npt.NDArray[np.uint8], questions: Tensor) -> Sequence[Tensor]:
        image = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            image = image.pin_memory()  # only then does the host not wait for the copy
        image = image.to(self.device, non_blocking=True)
        memory: tuple[Tensor, ...] = self._encode_module(image, *((questions,) if questions.shape[1] else ()))
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
