"""Embeddings of a new captioner: the token embeddings that its tokenizer needs, and a new encoder's position embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capcli.models.checkpoint import quiet_transformers
from capcli.models.encoders import position_waves
from capcli.training.model.pretrained import seeded

SCALES = ("initializer_range", "init_std", "initializer_factor")  # the standard deviation of new weights, by family
ROUNDING = 256  # a vocabulary may be padded by up to this many rows for hardware efficiency


def token_count(tokenizer: Any) -> int:
    """The number of embeddings that a tokenizer needs: its highest id + 1, which exceeds its length where ids have gaps."""
    return int(max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())))


def needs_new_embeddings(tokenizer: Any, own_tokenizer: Any, vocab_size: int) -> bool:
    """Whether a model with `vocab_size` embeddings, trained with `own_tokenizer`, maps ids to other tokens than `tokenizer`.

    Without `own_tokenizer` (None) only the size is compared.
    """
    if own_tokenizer is None:
        return not 0 <= vocab_size - token_count(tokenizer) < ROUNDING
    vocabulary = tokenizer.get_vocab()
    return any(vocabulary.get(token) != i for token, i in own_tokenizer.get_vocab().items() if i < vocab_size)


def fit_embeddings(model: Any, count: int, seed: int, *, new: bool) -> None:
    """Gives a model an embedding for each of `count` tokens.

    With `new` all of them are random, and the output layer's too; else the model keeps those that it has.
    """
    if new:
        renew_embeddings(model, count, seed)
    else:
        extend_embeddings(model, count, seed)


def renew_embeddings(model: Any, count: int, seed: int) -> None:
    """Replaces token embeddings and output layer by `count` random rows, as in a new model of this config."""
    config = model.config
    std = next(value for name in SCALES if (value := getattr(config, name, None)))
    with seeded(seed, "embeddings"), quiet_transformers():
        model.resize_token_embeddings(count, mean_resizing=False)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        nn.init.normal_(embeddings.weight, std=std)
        if head is None:  # an encoder has none
            return
        if head.weight is not embeddings.weight:
            nn.init.normal_(head.weight, std=std)
        if head.bias is not None:
            nn.init.zeros_(head.bias)


def extend_embeddings(model: Any, count: int, seed: int) -> None:
    """Adds random rows for tokens that were added to the tokenizer, up to `count` in all."""
    if count > model.config.vocab_size:
        with seeded(seed, "embeddings"), quiet_transformers():
            model.resize_token_embeddings(count, mean_resizing=False)


@torch.no_grad()
def set_positions(encoder: Any) -> None:
    """Sets the position embeddings of a new ViT, DeiT or BEiT to sines and cosines of row and column.

    Other encoders, and widths that are not a multiple of 4, stay as they are. Training changes them further (Beyer et al.,
    2022, "Better plain ViT baselines for ImageNet-1k"). With transformers' initial values, a tenth of a patch embedding's
    size, a small encoder trained on captions alone does not learn left and right for thousands of steps (BENCHMARKS.md).
    """
    embeddings: Tensor | None = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(embeddings, Tensor):
        return
    height, width = (
        image // patch
        for image, patch in zip(_pair(encoder.config.image_size), _pair(encoder.config.patch_size), strict=True)
    )
    others = embeddings.shape[1] - height * width  # the class token and others without a position in the image
    if embeddings.shape[2] % 4 or others < 0:
        return
    embeddings[:, :others] = 0
    embeddings[:, others:] = position_waves(height, width, embeddings.shape[2])


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
