"""Any image encoder as a part of an architecture of capcli's own: its config, and what it leaves of an image."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

USUAL_SIZE = 224  # of images, for encoders that take any and whose config names none


def sub_config(given: dict[str, Any] | PretrainedConfig | None, kind: str) -> PretrainedConfig:
    """A part's config from its values, whose model_type is `kind` where they name none."""
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    made: PretrainedConfig = AutoConfig.for_model(values.pop("model_type", kind), **values)
    return made


def seen_size(encoder: Any) -> Any:
    """The image size that an encoder's config names, or the usual one."""
    return getattr(encoder, "image_size", None) or USUAL_SIZE


def seen_width(encoder: Any) -> int:
    """Channels of an encoder's last_hidden_state."""
    if encoder.model_type == "resnet":
        return int(encoder.hidden_sizes[-1])
    return int(encoder.hidden_size)


def in_reading_order(seen: Tensor) -> Tensor:
    """[E, C, h, w], or [E, M, C] already -> [E, M, C]."""
    return seen.flatten(2).transpose(1, 2) if seen.dim() == 4 else seen
