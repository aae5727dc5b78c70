"""PyTorch, eagerly: the runtime every other is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from capcli.runtimes.seated import Seated


class Eager(Seated):
    """Runs a captioner's `encode` and `step` modules."""

    def __init__(self, encode: nn.Module, step: nn.Module, device: torch.device) -> None:
        super().__init__(device)
        self._encode_module, self._step_module = encode, step

    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Sequence[Tensor]:
        memory: tuple[Tensor, ...] = self._encode_module(torch.from_numpy(pixels).to(self.device, non_blocking=True))
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
