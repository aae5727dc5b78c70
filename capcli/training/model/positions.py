"""Where the patches of a new vision encoder stand: position embeddings begin as sines and cosines of row and column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from capcli.models.encoders import position_waves


@torch.no_grad()
def set_positions(encoder: Any) -> None:
    """Writes them over the random ones of ViT, DeiT and BEiT; encoders without, and odd widths, stay as they are.

    They go on learning from there (Beyer et al., 2022, "Better plain ViT baselines for ImageNet-1k"). As transformers leaves
    them they are a tenth of what a patch holds, and a small encoder trained on captions alone stays blind to left and right
    for thousands of steps (BENCHMARKS.md).
    """
    embeddings: Tensor | None = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(embeddings, Tensor):
        return
    height, width = (
        a // b for a, b in zip(pair(encoder.config.image_size), pair(encoder.config.patch_size), strict=True)
    )
    others = embeddings.shape[1] - height * width  # of the class token, and what else has no place
    if embeddings.shape[2] % 4 or others < 0:
        return
    embeddings[:, :others] = 0
    embeddings[:, others:] = position_waves(height, width, embeddings.shape[2])


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
