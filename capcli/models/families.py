"""The families of captioners: which file of this folder knows a model, by the `model_type` of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from torch import nn

from capcli.models.modules import Encode, Step

FILES = {"vision-encoder-decoder": "vision_encoder_decoder", "blip": "blip", "git": "git", "florence2": "florence2"}

TRAINED = ("vision-encoder-decoder",)


class Family(Protocol):
    """What a family's file holds."""

    LOADER: str  # transformers' class
    Encode: Callable[[nn.Module, float, Sequence[float], Sequence[float]], Encode]
    Step: Callable[[nn.Module], Step]

    def generation(self, config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """The generation settings in force where the user says nothing: of config.json and the model's own."""

    # `question(tokenizer, prompt)`, the ids that a prompt becomes, is there where the encoder is asked, not the decoder.


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json that `capcli.models.files` lets through."""
    return cast("Family", import_module(f"capcli.models.{FILES[config['model_type']]}"))
