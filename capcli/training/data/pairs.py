"""Pairs of an image and one of its captions, loaded by worker processes and collated into batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from capcli import pixels
from capcli.errors import ImageError
from capcli.models.families import IGNORED
from capcli.pixels import PixelSpec
from capcli.records import Annotated, Failure, Loaded, Stored
from capcli.sources.dataset_images import StoredImages, address_of

Tokens = npt.NDArray[np.int32]


class PackedStrings:
    """Byte strings in one array: forked workers share it, where reading a million Python objects would copy their pages."""

    def __init__(self, strings: Iterable[bytes]) -> None:
        parts = list(strings)
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)
        self._ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()


class Images:
    """The images of a split by number, as pixels of `spec` and `size` (height, width)."""

    def __init__(self, annotated: Sequence[Annotated], spec: PixelSpec, size: tuple[int, int], max_pixels: int) -> None:
        self.spec, self.size, self.max_pixels = spec, size, max_pixels
        self._names = PackedStrings(os.fsencode(image.name) for image in annotated)
        self._addresses = PackedStrings(_address(image.image) for image in annotated)
        self._stored = StoredImages()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def load(self, index: int) -> npt.NDArray[np.uint8]:
        """uint8 [height, width, 3]. Raises ImageError."""
        source = self._stored.find(os.fsdecode(self._addresses[index]))
        image, _ = pixels.load(source, self.spec, max_pixels=self.max_pixels)
        if image.shape[:2] != self.size:
            (height, width), (encoder_height, encoder_width) = image.shape[:2], self.size
            raise ImageError(
                "shape",
                f"the processor resizes it to {width}x{height}, the encoder expects {encoder_width}x{encoder_height}",
            )
        return image

    def loaded(self, index: int) -> Loaded | Failure:
        """The image under its name, or the reason why it cannot be loaded."""
        try:
            return Loaded(self.name(index), self.load(index))
        except ImageError as error:
            return Failure(self.name(index), error.kind, str(error))


def _address(image: str | Stored | None) -> bytes:
    assert image is not None, "training needs annotations whose images were located"
    return os.fsencode(address_of(image))


@dataclass(frozen=True, slots=True)
class Pair:
    """One image with one of its captions; `pixels` is None where the image could not be loaded, and `failure` states why.

    `encoder_ids` are the token ids that the encoder reads with the image; empty where it reads none.
    """

    pixels: npt.NDArray[np.uint8] | None  # [height, width, 3]
    tokens: Tokens  # [T], without the start token
    failure: Failure | None = None
    encoder_ids: Sequence[int] | Tokens = ()


class Pairs(Dataset[Pair]):
    """Every caption of every image, with its image: `tokens[i]` holds the token ids of each caption of image i.

    `encoder_ids` are the token ids that the encoder reads with every image, `tags` [images, W] those of each image.
    """

    def __init__(
        self,
        images: Images,
        tokens: Sequence[Sequence[Sequence[int]]],
        encoder_ids: Sequence[int] = (),
        tags: Tokens | None = None,
    ) -> None:
        self.images, self.encoder_ids, self.tags = images, encoder_ids, tags
        flat = [ids for captions in tokens for ids in captions]
        self._image = np.repeat(np.arange(len(tokens), dtype=np.int64), [len(captions) for captions in tokens])
        self._ids = np.fromiter((i for ids in flat for i in ids), np.int32)
        self._ends = np.cumsum([0, *map(len, flat)])

    def __len__(self) -> int:
        return len(self._image)

    def tokens(self, index: int) -> Tokens:
        return self._ids[self._ends[index] : self._ends[index + 1]]

    def count_truncated(self, end: int) -> int:
        """How many captions are longer than the labels may be, and so lack the `end` token."""
        return int((self._ids[self._ends[1:] - 1] != end).sum())

    def image(self, index: int) -> int:
        """The number of a pair's image."""
        return int(self._image[index])

    def first(self, image: int) -> int:
        """The index of an image's first pair."""
        return int(np.searchsorted(self._image, image))

    def __getitem__(self, index: int) -> Pair:
        return self.pair(index)

    def pair(self, index: int, draw: int = 0) -> Pair:  # noqa: ARG002
        """A pair; `draw`, how often it was drawn before, only matters to masked captions."""
        image = self.image(index)
        loaded, encoder_ids = self.images.loaded(image), self.encoder_ids if self.tags is None else self.tags[image]
        if isinstance(loaded, Failure):
            return Pair(None, self.tokens(index), loaded, encoder_ids)
        return Pair(loaded.pixels, self.tokens(index), None, encoder_ids)


@dataclass(frozen=True, slots=True)
class Collate:
    """Pairs -> a batch.

    `pixel_values` uint8 [B, height, width, 3], `decoder_input_ids` and `labels` [B, T], `encoder_ids` [B, W].

    The decoder reads the start token and the caption without its last token; the labels are the caption, and IGNORED after
    its end. Which labels are IGNORED depends on lengths, never on token ids, so a model whose padding is its end token
    still learns to emit it. A pair without its image has black pixels and only IGNORED labels; its failure is in `failures`.
    """

    size: tuple[int, int]  # height, width
    start: int
    pad: int

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        longest = max(len(pair.tokens) for pair in pairs)
        pixels = np.zeros((len(pairs), *self.size, 3), np.uint8)
        labels = np.full((len(pairs), longest), IGNORED, np.int64)
        decoder_input = np.full((len(pairs), longest), self.pad, np.int64)
        decoder_input[:, 0] = self.start
        encoder_ids = np.full((len(pairs), max(len(pair.encoder_ids) for pair in pairs)), IGNORED, np.int64)
        for row, pair in enumerate(pairs):
            count = len(pair.tokens)
            decoder_input[row, 1:count] = pair.tokens[:-1]
            encoder_ids[row, : len(pair.encoder_ids)] = pair.encoder_ids
            if pair.pixels is not None:
                pixels[row] = pair.pixels
                labels[row, :count] = pair.tokens
        return {
            "pixel_values": torch.from_numpy(pixels),
            "decoder_input_ids": torch.from_numpy(decoder_input),
            "labels": torch.from_numpy(labels),
            "encoder_ids": torch.from_numpy(encoder_ids),
            "failures": [pair.failure for pair in pairs if pair.failure],
        }
