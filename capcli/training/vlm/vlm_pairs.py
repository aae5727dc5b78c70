"""Captions with their images as a vision-language model learns them: the processor's tensors, with the answer at their end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from capcli import pixels
from capcli.errors import ImageError
from capcli.models.families import IGNORED
from capcli.models.vlm import vlm_family, with_ids
from capcli.pixels import PixelSpec
from capcli.records import Annotated, Failure
from capcli.training.data.pairs import Images, PackedStrings, Pairs, Tokens
from capcli.training.loop.loss import token_sum
from capcli.training.vlm.vlm_assembly import AssembledVlm

OF_TOKENS = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # inputs with a value for each token


class WholeImages(Images):
    """The images of a split, whole: their longest edge has at most `max_edge` pixels, where that is not None."""

    def __init__(self, annotated: Sequence[Annotated], max_edge: int | None, max_pixels: int) -> None:
        super().__init__(
            annotated, PixelSpec.from_config({"image_processor_type": "ViTImageProcessor"}), (0, 0), max_pixels
        )
        self.max_edge = max_edge

    def load(self, index: int) -> npt.NDArray[np.uint8]:
        source = self._stored.find(os.fsdecode(self._addresses[index]))
        return pixels.load_whole(source, max_pixels=self.max_pixels, max_edge=self.max_edge)[0]


@dataclass(frozen=True, slots=True)
class VlmPair:
    """One image with one of its captions: the model's inputs, whose last tokens are the answer, and the answer's ids.

    `inputs` is empty where the image could not be loaded or processed, and `failure` states why.
    """

    inputs: Mapping[str, Tensor]
    answer: Tokens
    failure: Failure | None = None


class VlmPairs(Pairs, Dataset[Any]):
    """Every caption of every image, with its image."""

    def __init__(
        self, images: WholeImages, answers: Sequence[Sequence[Sequence[int]]], tags: Sequence[str], model: AssembledVlm
    ) -> None:
        super().__init__(images, answers)
        self._tags, self._model = PackedStrings(text.encode() for text in tags), model

    @classmethod
    def of(cls, annotated: Sequence[Annotated], model: AssembledVlm, max_pixels: int) -> VlmPairs:
        answers = [[model.answer_ids(caption, image.tags) for caption in image.captions] for image in annotated]
        images = WholeImages(annotated, model.given.max_edge, max_pixels)
        return cls(images, answers, [image.tags for image in annotated], model)

    def prompt(self, image: int) -> str | None:
        """The prompt of an image."""
        return self._model.prompt(self._tags[image].decode())

    def pair(self, index: int, draw: int = 0) -> Any:  # noqa: ARG002
        image, answer = self.image(index), self.tokens(index)
        name = self.images.name(image)
        try:
            given, auto = self._model.given, self._model.auto
            inputs = given.made(auto.inputs, self.images.load(image), self.prompt(image))
            return VlmPair(self._model_inputs(inputs, answer), answer)
        except ImageError as error:
            return VlmPair({}, answer, Failure(name, error.kind, str(error)))

    def _model_inputs(self, inputs: Mapping[str, Tensor], answer: Tokens) -> Mapping[str, Tensor]:
        family = vlm_family(self._model.files.config)
        inputs = with_ids(inputs, self._model.auto.model)
        length = inputs["input_ids"].shape[1]
        ids = torch.from_numpy(answer.astype(np.int64))[None]
        added = {"attention_mask": torch.ones_like(ids)}
        added |= {name: torch.full_like(ids, family.answer_type) for name in OF_TOKENS[1:]}
        return {
            **inputs,
            "input_ids": torch.cat((inputs["input_ids"], ids), 1),
            **{
                name: torch.cat((value, added[name].to(value.dtype)), 1)
                for name, value in inputs.items()
                if name in OF_TOKENS and value.shape[1] == length
            },
        }


class VlmCollate:
    """Pairs -> a batch: `samples`, the inputs of each, `labels` [B, T], IGNORED after the answer, and `failures`.

    Prompts differ in length and images in shape, so samples are not stacked: the model computes them one after the other.
    """

    size = (0, 0)  # images have shapes of their own

    def __call__(self, pairs: Sequence[VlmPair]) -> dict[str, Any]:
        labels = np.full((len(pairs), max(len(pair.answer) for pair in pairs)), IGNORED, np.int64)
        for row, pair in enumerate(pairs):
            if pair.inputs:
                labels[row, : len(pair.answer)] = pair.answer
        return {
            "labels": torch.from_numpy(labels),
            "samples": [dict(pair.inputs) for pair in pairs],
            "failures": [pair.failure for pair in pairs if pair.failure],
        }


def answers_loss(model: Any, batch: Mapping[str, Any], label_smoothing: float = 0.0) -> Tensor:
    """The summed cross-entropy of the answers of a batch."""
    total: Tensor = next(model.parameters()).new_zeros(())
    for inputs, row in zip(batch["samples"], batch["labels"], strict=True):
        count = int((row != IGNORED).sum())
        if count:
            logits = model(**inputs, use_cache=False).logits[:, -count - 1 : -1]
            total = total + token_sum(logits, row[None, :count], label_smoothing)
    return total
