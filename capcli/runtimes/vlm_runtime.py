"""The PyTorch runtime of vision-language models: each image is its slot's prefix, of a length of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from capcli.decoding.loop import PromptTooLongError, UnencodableError, out_of_memory
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.models.vlm import Prefill, VlmStep
from capcli.runtimes.base import EncodedChunk, clear, fill, with_image
from capcli.runtimes.eager import Eager, computed

ROOM = 64  # prefixes get room in steps of this many entries


class VlmRuntime(Eager):
    """Runs `prefill` and `step`. Images are encoded one by one, so that a prefix does not depend on other images.

    A prefix has up to `settings.prompt_room` - 1 entries.
    """

    def __init__(self, prefill: Prefill, step: VlmStep, device: torch.device, *, record: bool = True) -> None:
        super().__init__(prefill, step, device, prefixed=True, record=record)
        self._prefill, self._step = prefill, step

    def replicas(self, count: int) -> Sequence[VlmRuntime]:  # noqa: ARG002
        return [self]  # a prefill keeps state in the model

    def shapes(
        self,
        slots: int,
        settings: Settings,  # noqa: ARG002
        most: int | None = None,
        count: int | None = None,
    ) -> Shapes:
        return Shapes(max(1, min(n for n in (slots, most, count) if n is not None)), chunk=1)

    def allocate(self, shapes: Shapes, settings: Settings) -> None:
        super().allocate(shapes, settings)
        self._image_entries = settings.prompt_room - 1
        slots = shapes.slots
        self._start = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._shift = torch.zeros(slots, dtype=torch.long, device=self.device)
        self._image = torch.zeros(slots, self._image_entries, dtype=torch.bool, device=self.device)

    def step(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        seen = with_image(self._image, visible)
        logits: Tensor = computed(
            self._step, tokens, position, self._start, self._shift, seen, self._image_entries, self._pool
        )
        return logits

    def pool_bytes(self, settings: Settings) -> int:
        """The bytes of a slot's pool."""
        return (settings.prompt_room - 1 + settings.entries) * self._step.entry_bytes

    @property
    def buffers(self) -> Sequence[Tensor]:
        """The pool of the last run."""
        return self._pool

    def _encoded(self, images: Sequence[Mapping[str, Tensor]], encoder_ids: Sequence[Sequence[int]]) -> EncodedChunk:  # noqa: ARG002
        (inputs,) = images
        length = inputs["input_ids"].shape[1]
        if length > self._settings.prompt_room:
            raise PromptTooLongError(-(-length // ROOM) * ROOM)
        try:
            keys_values, shift = self._prefill({name: self._placed(value) for name, value in inputs.items()})
        except Exception as error:  # of the model's code, for the image that it cannot take
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:300]
            raise UnencodableError(f"the model cannot process it: {type(error).__name__}: {reason}") from error
        return EncodedChunk(keys_values, shift[:, None])

    def _placed(self, value: Tensor) -> Tensor:
        """A tensor on the device; floating ones in the model's dtype."""
        if self.device.type == "cuda":
            value = value.pin_memory()  # otherwise the host waits for the copy
        value = value.to(self.device, non_blocking=True)
        return value.to(self._step.dtype) if value.is_floating_point() else value

    def _admitted(self, encoded: EncodedChunk, slots: Sequence[int]) -> Tensor:
        keys_values = encoded.keys_values
        if not self._pool:
            entries = self._image_entries + self._settings.entries
            self._pool = [x.new_zeros(self._shapes.slots, x.shape[1], entries, x.shape[3]) for x in keys_values]
        at = torch.tensor(slots, device=self.device)
        for mine, new in zip(self._pool, keys_values, strict=True):
            clear(mine, at)  # a masked NaN still makes the result NaN
            fill(mine, at, new)
        length = keys_values[0].shape[2]
        self._start[at], self._shift[at] = length, encoded.encoder_ids[:, 0]
        self._image[at] = torch.arange(self._image_entries, device=self.device) < length
        finite: Tensor = keys_values[0].isfinite().flatten(1).all(1)
        return finite
