"""Image encoders as parts of capcli's own architectures: their configs, sizes, and the positions of their features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig

WAVES = 10_000.0  # the longest wave over the shortest
USUAL_SIZE = 224  # of images, for encoders that take any and whose config names none


def sub_config(given: dict[str, Any] | PretrainedConfig | None, kind: str) -> PretrainedConfig:
    """A part's config from its values, whose model_type is `kind` where they name none."""
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    made: PretrainedConfig = AutoConfig.for_model(values.pop("model_type", kind), **values)
    return made


def image_size_of(encoder: Any) -> Any:
    """The image size that an encoder's config names, or the usual one."""
    return getattr(encoder, "image_size", None) or USUAL_SIZE


def feature_width(encoder: Any) -> int:
    """Channels of an encoder's last_hidden_state."""
    if encoder.model_type == "resnet":
        return int(encoder.hidden_sizes[-1])
    return int(encoder.hidden_size)


def flatten_features(seen: Tensor) -> Tensor:
    """[E, C, h, w], or [E, M, C] already -> [E, M, C]."""
    return seen.flatten(2).transpose(1, 2) if seen.dim() == 4 else seen


def position_waves(height: int, width: int, channels: int) -> Tensor:
    """[height * width, channels]: a quarter each of the column's sines and cosines, and the row's."""
    rate = WAVES ** -torch.linspace(0, 1, channels // 4)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = rows.flatten()[:, None] * rate, columns.flatten()[:, None] * rate
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), 1)


def position_features(seen: Tensor, rows: int, columns: int) -> Tensor:
    """For each token of an image's [E, M, C] sines and cosines of its row and column [M, C]; 0 for what has no place.

    An odd C has none.
    """
    others = seen.shape[1] - rows * columns  # of the class token, which comes first
    if seen.shape[2] % 4 or others < 0:
        return seen.new_zeros(())
    there = position_waves(rows, columns, seen.shape[2]).to(seen)
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


def register_architecture(config: Any, model: Any) -> None:
    """Make an architecture known to transformers' AutoConfig and AutoModel."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
