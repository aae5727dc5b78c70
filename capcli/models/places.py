"""Where what an image encoder leaves of an image stands in it: rows and columns, and sines and cosines of these."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WAVES = 10_000.0  # the longest wave over the shortest


def waves(height: int, width: int, channels: int) -> Tensor:
    """[height * width, channels]: a quarter each of the column's sines and cosines, and the row's."""
    rate = WAVES ** -torch.linspace(0, 1, channels // 4)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = rows.flatten()[:, None] * rate, columns.flatten()[:, None] * rate
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), 1)


def places(seen: Tensor, rows: int, columns: int) -> Tensor:
    """For each token of an image's [E, M, C] sines and cosines of its row and column [M, C]; 0 for what has no place.

    An odd C has none.
    """
    others = seen.shape[1] - rows * columns  # of the class token, which comes first
    if seen.shape[2] % 4 or others < 0:
        return seen.new_zeros(())
    there = waves(rows, columns, seen.shape[2]).to(seen)
    return torch.cat((there.new_zeros(others, there.shape[1]), there))


def grid(encoder: Any, seen: Tensor, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of what an encoder leaves of an image: [E, C, h, w], or [E, M, C] in the order of reading."""
    if seen.dim() == 4:
        return seen.shape[2], seen.shape[3]
    patch = encoder.patch_size
    down, across = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
    if hasattr(encoder, "depths"):  # Swin pads to whole patches, and merges four into one after each stage but the last
        merged = 2 ** (len(encoder.depths) - 1)
        return math.ceil(height / (down * merged)), math.ceil(width / (across * merged))
    return height // down, width // across
