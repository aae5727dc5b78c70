"""The base of every runtime: the buffers of the slots, the admission of images into them, and the input of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """An encoded chunk of E images.

    `keys_values` are the images' memory or prefix: keys and values of each layer in turn, 2 x layers of [E, H, M, D].
    `encoder_ids` int64 [E, W] are the ids that the encoder read; of a vision-language model the shift of positions [E, 1]. `done`
    is the CUDA event of the end of encoding; None: it ended.
    """

    keys_values: Sequence[Tensor]
    encoder_ids: Tensor
    done: torch.cuda.Event | None = None

    def ready(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


class SlotRuntime(ABC):
    """A runtime without the two calls that run a model; the interface is `capcli.decoding.loop.Runtime`.

    The encoder's keys and values of an image are its slot's memory, for cross-attention, or, with `prefixed`, the first M
    entries of its slot's pool (its prefix). The buffers of a run are the memory, 2 x layers of [S, H, M, D] (none with
    `prefixed`), and the pool, 2 x layers of [S, H, N, D] with N = P + R*T entries, M more with `prefixed`. `keep` is the dtype
    of both; None: that of the encoder's output.
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
        """Pixels [E, h, w, 3] and ids int64 [E, W] -> memory or prefix, 2 x layers of [E, H, M, D]."""

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
        """tokens and position [S, Q], at [S], visible bool [S, Q, N] -> logits [S, Q, V].

        The Q new keys and values of slot s are written to the pool's entries from `at[s]` on.
        """

    def replicas(self, count: int) -> Sequence[SlotRuntime]:  # noqa: ARG002
        """`count` runtimes with the same weights, one per thread, this one first; only this one where it allows no others."""
        return [self]

    def shapes(
        self,
        slots: int,
        settings: Settings,  # noqa: ARG002
        most: int | None = None,
        count: int | None = None,
    ) -> Shapes:
        """The shapes of a run with `slots` slots, or fewer where only `most` fit into memory or there are `count` images."""
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

    def encode(self, images: Sequence[Any], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:
        return self._encoded(images, encoder_ids)

    def admit(self, encoded: EncodedChunk, slots: Sequence[int]) -> Tensor:
        return self._admitted(encoded, slots)

    def _encoded(self, images: Sequence[Any], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:
        """`encode`, on the stream that is current."""
        ids = torch.tensor(encoder_ids, dtype=torch.long, device=self.device)  # [E, W]
        return EncodedChunk(self._encode(np.stack(images), ids), ids)

    def _admitted(self, encoded: EncodedChunk, slots: Sequence[int]) -> Tensor:
        """`admit`, for a chunk that is ready."""
        keys_values = encoded.keys_values
        if not self._pool:
            self._allocate_buffers(keys_values)
        at = torch.tensor(slots, device=self.device)
        for entries in self._pool:
            clear(entries, at)  # a masked NaN still makes the result NaN, and a free slot continues to write entries
        for entries, new in zip(self._pool if self.prefixed else self._memory, keys_values, strict=True):
            fill(entries, at, new)
        image = self._image_visible(encoded.encoder_ids)
        self._image[at] = image[: len(slots)]
        if len(self._prompt) > 1:
            self._write_prompt(keys_values, image, at)
        # each of the first layer's keys depends on all of the image; an overflow in later layers appears in the score
        finite: Tensor = keys_values[0][: len(slots)].isfinite().flatten(1).all(1)
        return finite

    def step(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        prompt, rows = len(self._prompt) - 1, tokens.shape[1]
        positions = (prompt + position)[:, None].expand(-1, rows)
        at = self._image_entries + prompt + position * rows
        return self._run_step(tokens, positions, at, with_image(self._image, visible), self._memory, self._pool)

    def repeated(self, step: Callable[[], None]) -> Callable[[], None]:
        return step

    def slot_bytes(self, pixels: npt.NDArray[np.uint8], settings: Settings) -> int:
        """The bytes of a slot's memory and pool; `pixels` [1, h, w, 3] is any image."""
        keys_values = self._encode(pixels, torch.tensor([settings.encoder_ids], dtype=torch.long, device=self.device))
        kept = [x.to(self._keep or x.dtype) for x in keys_values]
        return sum(x.nbytes + x.nbytes // x.shape[2] * settings.entries for x in kept)

    def _allocate_buffers(self, keys_values: Sequence[Tensor]) -> None:
        """Memory and pool in the shapes of the first chunk's keys and values; they are not known before."""
        slots = self._shapes.slots
        self._image_entries = keys_values[0].shape[2] if self.prefixed else 0
        self._image = torch.ones(slots, self._image_entries, dtype=torch.bool, device=self.device)
        entries = self._image_entries + self._settings.entries
        self._memory = (
            [] if self.prefixed else [x.new_zeros(slots, *x.shape[1:], dtype=self._keep) for x in keys_values]
        )
        self._pool = [x.new_zeros(slots, x.shape[1], entries, x.shape[3], dtype=self._keep) for x in keys_values]

    def _image_visible(self, encoder_ids: Tensor) -> Tensor:
        """Which image entries are visible, bool [E, M]: all but those of missing tokens, which are the last W entries."""
        visible = torch.ones(len(encoder_ids), self._image_entries, dtype=torch.bool, device=self.device)
        if self._image_entries and encoder_ids.shape[1]:
            visible[:, -encoder_ids.shape[1] :] = encoder_ids >= 0
        return visible

    def _write_prompt(self, keys_values: Sequence[Tensor], image_visible: Tensor, at: Tensor) -> None:
        """Runs the prompt's first P tokens for a chunk and keeps their entries; its last token is the input of the first step."""
        chunk, prompt, image = keys_values[0].shape[0], len(self._prompt) - 1, self._image_entries
        empty = [x.new_zeros(chunk, x.shape[1], prompt, x.shape[3]) for x in keys_values]
        memory, pool = keys_values, empty
        if image:
            memory, pool = [], [torch.cat(both, 2) for both in zip(keys_values, empty, strict=True)]
        order = torch.arange(prompt, device=self.device).expand(chunk, -1)
        visible = torch.ones(prompt, prompt, dtype=torch.bool, device=self.device).tril().expand(chunk, -1, -1)
        tokens = self._prompt[:-1].expand(chunk, -1)
        self._run_step(tokens, order, image + order[:, 0], with_image(image_visible, visible), memory, pool)
        for entries, new in zip(self._pool, pool, strict=True):
            fill(entries[:, :, image:], at, new[:, :, image:])


def clear(entries: Tensor, at: Tensor) -> None:
    """Zeroes the slots `at` [n] of `entries` [S, H, N, D]."""
    if entries.device.type != "cpu":
        entries.index_fill_(0, at, 0)
        return
    for slot in at.tolist():  # on a CPU, indexing with a tensor copies element by element
        entries[slot].zero_()


def fill(entries: Tensor, at: Tensor, new: Tensor) -> None:
    """Writes the first n of `new` [E, H, M, D] into the first M entries of the slots `at` [n] of `entries` [S, H, N, D]."""
    if entries.device.type != "cpu":
        entries[at, :, : new.shape[2]] = new[: len(at)].to(entries.dtype)
        return
    for slot, image in zip(at.tolist(), new, strict=False):
        entries[slot, :, : new.shape[2]] = image


def with_image(image: Tensor, visible: Tensor) -> Tensor:
    """Image entries [S, M] before those of `visible` [S, Q, N] -> [S, Q, M + N]: every row attends to its whole image."""
    if not image.shape[1]:
        return visible
    return torch.cat((image[:, None].expand(-1, visible.shape[1], -1), visible), 2)
