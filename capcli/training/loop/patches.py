"""Images of which the encoder sees a part only, while it learns: patches are hidden at random."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

USUAL = 16  # pixels, of encoders that have no patches


def hide_patches(pixels: Tensor, size: int, share: float) -> Tensor:
    """Normalised images [B, 3, h, w], of each that share of its patches of `size` pixels at zero, its mean.

    As many of every image; drawn from torch's own random numbers, which a run that goes on takes up where they were.
    """
    rows, columns = (math.ceil(side / size) for side in pixels.shape[2:])
    count = round(share * rows * columns)
    order = torch.rand(len(pixels), rows * columns, device=pixels.device).argsort(1)
    seen = (order >= count).view(-1, 1, rows, columns).to(pixels.dtype)
    whole = seen.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return pixels * whole[:, :, : pixels.shape[2], : pixels.shape[3]]


def patch_size(encoder: Any) -> int:
    """Pixels of the side of what an encoder's last layer has one state of; Swin merges four into one after each stage."""
    size = getattr(encoder, "patch_size", USUAL)
    side = max(size) if isinstance(size, list | tuple) else int(size)
    return side * int(2 ** (len(getattr(encoder, "depths", (0,))) - 1))
