"""What every runtime does alike: each slot has a memory and a pool of its own, and images are seated in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capcli.decoding.loop import Shapes
from capcli.decoding.settings import Settings


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """Memory or prefixes `seen` and the encoder_ids `asked` of a chunk; there once `done`, a CUDA event, has happened."""

    seen: Sequence[Tensor]
    asked: Tensor
    done: torch.cuda.Event | None = None

    def ready(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


class SlotRuntime(ABC):
    """A runtime but for what executes the two graphs; see `capcli.decoding.loop.Runtime`.

    What encode leaves of an image is its memory, for cross-attention, or, with `prefixed`, the first entries of its pool.
    `keep` is the dtype in which slots hold it, and what steps write, None: as encode leaves it.
    """

    def __init__(self, device: torch.device, *, prefixed: bool = False, keep: torch.dtype | None = None) -> None:
        self.device, self.prefixed = device, prefixed
        self._keep = keep
        self.lag = 1 if device.type == "cuda" else 0
        self.ahead = False
        self._memory: list[Tensor] = []
        self._pool: list[Tensor] = []

    @abstractmethod
    def _encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Tensor) -> Sequence[Tensor]:
        """[E, h, w, 3] and int64 [E, W] -> memory or prefix, 2 x layers of [E, H, M, D]."""

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

    def beside(self, count: int) -> Sequence[SlotRuntime]:  # noqa: ARG002
        """Itself and others over the same weights, each for a thread of its own: `count`, or itself alone if no others can be."""
        return [self]

    def shapes(
        self,
        slots: int,
        settings: Settings,  # noqa: ARG002
        most: int | None = None,
        count: int | None = None,
    ) -> Shapes:
        """The shapes of a run with so many slots, or with those that fit the memory, `most`, or that pay for `count` images."""
        shapes = Shapes.of(slots if most is None else min(slots, most))
        return shapes if count is None else shapes.shared_by(count)

    def fewer(self, shapes: Shapes, settings: Settings) -> Shapes:  # noqa: ARG002
        return shapes.halved()

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        self._memory, self._pool = [], []
        self._image_entries = 0
        self._shapes, self._settings = shapes, settings
        self._prompt = torch.tensor(settings.prompt, device=self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode(self, pixels: npt.NDArray[np.uint8], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:
        asked = torch.tensor(encoder_ids, dtype=torch.long, device=self.device)  # [E, W]
        return EncodedChunk(self._encode(pixels, asked), asked)

    def admit(self, encoded: EncodedChunk, seats: Sequence[int]) -> Tensor:
        seen, asked = encoded.seen, encoded.asked
        if not self._pool:
            self._make_room(seen)
        at = torch.tensor(seats, device=self.device)
        for entries in self._pool:
            clear(entries, at)  # a NaN behind a mask still poisons, and an empty seat goes on writing
        for mine, new in zip(self._pool if self.prefixed else self._memory, seen, strict=True):
            fill(mine, at, new)
        shown = self._shown(asked)
        self._image[at] = shown[: len(seats)]
        if len(self._prompt) > 1:
            self._write_prompt(seen, shown, at)
        # the first layer's keys mix all of what the encoder saw; what overflows later shows in the score
        finite: Tensor = seen[0][: len(seats)].isfinite().flatten(1).all(1)
        return finite

    def step(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        prompt, rows = len(self._prompt) - 1, tokens.shape[1]
        positions = (prompt + position)[:, None].expand(-1, rows)
        at = self._image_entries + prompt + position * rows
        return self._run_step(tokens, positions, at, with_image(self._image, visible), self._memory, self._pool)

    def repeated(self, turn: Callable[[], None]) -> Callable[[], None]:
        """`turn` itself; a runtime that can record a whole step gives the recording."""
        return turn

    def slot_bytes(self, pixels: npt.NDArray[np.uint8], settings: Settings) -> int:
        """What a slot's memory and pool hold; `pixels` [1, h, w, 3] is any one image."""
        seen = self._encode(pixels, torch.tensor([settings.encoder_ids], dtype=torch.long, device=self.device))
        kept = [x.to(self._keep or x.dtype) for x in seen]
        return sum(x.nbytes + x.nbytes // x.shape[2] * settings.entries for x in kept)

    def _make_room(self, seen: Sequence[Tensor]) -> None:
        slots, entries = self._shapes.slots, self._settings.entries
        self._image_entries = seen[0].shape[2] if self.prefixed else 0
        self._image = torch.ones(slots, self._image_entries, dtype=torch.bool, device=self.device)
        places = self._image_entries + entries
        self._memory = [] if self.prefixed else [x.new_zeros(slots, *x.shape[1:], dtype=self._keep) for x in seen]
        self._pool = [x.new_zeros(slots, x.shape[1], places, x.shape[3], dtype=self._keep) for x in seen]

    def _shown(self, asked: Tensor) -> Tensor:
        """Which entries of images rows see, [E, image entries]: all but those of words that a question lacks, at the end."""
        shown = torch.ones(len(asked), self._image_entries, dtype=torch.bool, device=self.device)
        if self._image_entries and asked.shape[1]:
            shown[:, -asked.shape[1] :] = asked >= 0
        return shown

    def _write_prompt(self, seen: Sequence[Tensor], shown: Tensor, at: Tensor) -> None:
        """Runs the prompt but for its last token, whose step is the caption's first, and keeps its entries."""
        chunk, prompt, image = seen[0].shape[0], len(self._prompt) - 1, self._image_entries
        room = [x.new_zeros(chunk, x.shape[1], prompt, x.shape[3]) for x in seen]
        memory, pool = ([], [torch.cat(each, 2) for each in zip(seen, room, strict=True)]) if image else (seen, room)
        order = torch.arange(prompt, device=self.device).expand(chunk, -1)
        visible = torch.ones(prompt, prompt, dtype=torch.bool, device=self.device).tril().expand(chunk, -1, -1)
        tokens = self._prompt[:-1].expand(chunk, -1)
        self._run_step(tokens, order, image + order[:, 0], with_image(shown, visible), memory, pool)
        for mine, new in zip(self._pool, pool, strict=True):
            fill(mine[:, :, image:], at, new[:, :, image:])


def clear(entries: Tensor, at: Tensor) -> None:
    """Zeros in the seats `at` [n]."""
    if entries.device.type != "cpu":
        entries.index_fill_(0, at, 0)
        return
    for seat in at.tolist():  # where a CPU is given indices it goes number by number
        entries[seat].zero_()


def fill(entries: Tensor, at: Tensor, new: Tensor) -> None:
    """Writes the first n of `new` [E, H, M, D] into the first M entries of the seats `at` [n]."""
    if entries.device.type != "cpu":
        entries[at, :, : new.shape[2]] = new[: len(at)].to(entries.dtype)
        return
    for seat, each in zip(at.tolist(), new, strict=False):
        entries[seat, :, : new.shape[2]] = each


def with_image(image: Tensor, visible: Tensor) -> Tensor:
    """[S, image entries] and [S, Q, N] -> [S, Q, image entries + N]: every row sees what there is of its image."""
    if not image.shape[1]:
        return visible
    return torch.cat((image[:, None].expand(-1, visible.shape[1], -1), visible), 2)
