"""Image encoders in capcli's own architectures (prefix, vision_t5): their configs, feature shapes and feature positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig

WAVES = 10_000.0  # ratio of the longest wavelength to the shortest
# Encoders that accept images of another size than the config's: DINOv2 interpolates its positions, the others have none.
ANY_SIZE = ("resnet", "swin", "swinv2", "donut-swin", "dinov2", "dinov2_with_registers")
# Weights of encoders that their last_hidden_state does not depend on, besides poolers.
UNUSED = {
    "clip_vision_model": ("post_layernorm.",),
    "siglip_vision_model": ("head.",),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), ("embeddings.mask_token",)),
}
POOLER = "pooler."
USUAL_SIZE = 224  # image size of encoders that accept any size and whose config has none


def sub_config(given: dict[str, Any] | PretrainedConfig | None, kind: str) -> PretrainedConfig:
    """A part's config from a dict; `kind` is its model_type where the dict has none."""
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    config: PretrainedConfig = AutoConfig.for_model(values.pop("model_type", kind), **values)
    return config


def image_size_of(encoder: Any) -> Any:
    """The image size in an encoder's config, else USUAL_SIZE."""
    return getattr(encoder, "image_size", None) or USUAL_SIZE


def unused_names(encoder: Any) -> list[str]:
    """The names of an encoder's weights that captions do not depend on."""
    starts = (POOLER, *UNUSED.get(encoder.config.model_type, ()))
    return [name for name, _ in encoder.named_parameters() if name.startswith(starts)]


def feature_width(encoder: Any) -> int:
    """Channels of an encoder's last_hidden_state."""
    if encoder.model_type == "resnet":
        return int(encoder.hidden_sizes[-1])
    return int(encoder.hidden_size)


def flatten_features(features: Tensor) -> Tensor:
    """[E, C, h, w] or [E, M, C] -> [E, M, C]."""
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features


def position_waves(height: int, width: int, channels: int) -> Tensor:
    """Position codes [height * width, channels]: sines and cosines of the column, then of the row, a quarter each."""
    rate = WAVES ** -torch.linspace(0, 1, channels // 4)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    row, column = rows.flatten()[:, None] * rate, columns.flatten()[:, None] * rate
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), 1)


def position_features(features: Tensor, rows: int, columns: int) -> Tensor:
    """Position codes [M, C] of the tokens [E, M, C] of a rows x columns grid; 0 for class tokens, which come first.

    A zero scalar where C is not a multiple of 4.
    """
    others = features.shape[1] - rows * columns  # class tokens
    if features.shape[2] % 4 or others < 0:
        return features.new_zeros(())
    codes = position_waves(rows, columns, features.shape[2]).to(features)
    return torch.cat((codes.new_zeros(others, codes.shape[1]), codes))


def grid(encoder: Any, features: Tensor, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of an encoder's features, [E, C, h, w] or [E, M, C] in row-major order, of height x width pixels."""
    if features.dim() == 4:
        return features.shape[2], features.shape[3]
    patch = encoder.patch_size
    down, across = (patch, patch) if isinstance(patch, int) else (patch[0], patch[1])
    if hasattr(encoder, "depths"):  # Swin pads to whole patches and merges 2 x 2 of them after each stage but the last
        merged = 2 ** (len(encoder.depths) - 1)
        return math.ceil(height / (down * merged)), math.ceil(width / (across * merged))
    return height // down, width // across


def register_architecture(config: Any, model: Any) -> None:
    """Registers an architecture with transformers' AutoConfig and AutoModel; registering it again changes nothing."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
