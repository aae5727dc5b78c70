"""What every runtime does alike: each slot has a memory and a pool of its own, and images are seated in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capcli.decoding.loop import Shapes
from capcli.decoding.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Seated(ABC):
    """A runtime but for what executes the two graphs; see `capcli.decoding.loop.Runtime`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lag = 1 if device.type == "cuda" else 0
        self._memory: list[Tensor] = []
        self._pool: list[Tensor] = []

    @abstractmethod
    def _encode(self, pixels: npt.NDArray[np.uint8]) -> Sequence[Tensor]:
        """[E, h, w, 3] -> memory, 2 x layers of [E, H, M, D]."""

    @abstractmethod
    def _run_step(
        self,
        tokens: Tensor,
        position: Tensor,
        at: Tensor,
        visible: Tensor,
        memory: Sequence[Tensor],
        pool: Sequence[Tensor],
    ) -> Tensor:
        """tokens and position [S, Q], at [S], visible [S, Q, N] -> logits [S, Q, V]; writes into the pool."""

    def shapes(self, slots: int, settings: Settings) -> Shapes:  # noqa: ARG002
        """The shapes of a run with about so many slots."""
        return Shapes.of(slots)

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        self._memory, self._pool = [], []
        self._shapes, self._settings = shapes, settings
        self._prompt = torch.tensor(settings.prompt, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def admit(self, pixels: npt.NDArray[np.uint8], seats: Sequence[int]) -> Tensor:
        memory = self._encode(pixels)
        if not self._memory:
            self._make_room(memory)
        at = torch.tensor(seats, device=self.device)
        for mine, new in zip(self._memory, memory, strict=True):
            mine.index_copy_(0, at, new[: len(seats)])
        for entries in self._pool:
            entries.index_fill_(0, at, 0)  # a NaN behind a mask still poisons, and an empty seat goes on writing
        if len(self._prompt) > 1:
            self._write_prefix(memory, at)
        # the first layer's keys mix all of what the encoder saw; what overflows later shows in the score
        finite: Tensor = memory[0][: len(seats)].isfinite().flatten(1).all(1)
        return finite

    def step(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        prefix, rows = len(self._prompt) - 1, tokens.shape[1]
        positions = (prefix + position)[:, None].expand(-1, rows)
        return self._run_step(tokens, positions, prefix + position * rows, visible, self._memory, self._pool)

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        """`turn` itself; a runtime that can record a whole step gives the recording."""
        return turn

    def slot_bytes(self, pixels: npt.NDArray[np.uint8], settings: Settings) -> int:
        """What a slot's memory and pool hold; `pixels` [1, h, w, 3] is any one image."""
        memory = self._encode(pixels)
        return sum(x.nbytes + x.nbytes // x.shape[2] * settings.entries for x in memory)

    def _make_room(self, memory: Sequence[Tensor]) -> None:
        slots, entries = self._shapes.slots, self._settings.entries
        self._memory = [x.new_zeros(slots, *x.shape[1:]) for x in memory]
        self._pool = [x.new_zeros(slots, x.shape[1], entries, x.shape[3]) for x in memory]

    def _write_prefix(self, memory: Sequence[Tensor], at: Tensor) -> None:
        """Runs the prompt but for its last token, whose step is the caption's first, and keeps its entries."""
        chunk, prefix = memory[0].shape[0], len(self._prompt) - 1
        pool = [x.new_zeros(chunk, x.shape[1], prefix, x.shape[3]) for x in memory]
        order = torch.arange(prefix, device=self.device).expand(chunk, -1)
        visible = torch.ones(prefix, prefix, dtype=torch.bool, device=self.device).tril().expand(chunk, -1, -1)
        self._run_step(self._prompt[:-1].expand(chunk, -1), order, order[:, 0], visible, memory, pool)
        for mine, new in zip(self._pool, pool, strict=True):
            mine[at, :, :prefix] = new[: len(at)]
