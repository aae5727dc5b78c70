"""VisionEncoderDecoderModel: an image encoder and a text decoder with cross-attention, each of several kinds.

Encoder and decoder are transformers' modules; the cache writes into the slots' pools. TrOCR and Donut are of this family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from capcli.models import cross_decoders, modules
from capcli.models.encoders import ANY_SIZE

LOADER = "VisionEncoderDecoderModel"
ENCODER, DECODER = ("encoder",), ("decoder",)
generation = modules.own_generation


class Encode(modules.Encode):
    """Pixels to memory, through the projection between an encoder and a decoder of different widths."""

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.encoder, rescale, mean, std)
        self.any_size = whole.encoder.config.model_type in ANY_SIZE
        self.decoder: nn.Module = whole.decoder
        self.project: nn.Module = getattr(whole, "enc_to_dec_proj", None) or nn.Identity()

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        return cross_decoders.keys_values(self.decoder, self.project(features))


def step_of(model: Any) -> modules.Step:
    """The step of the model's decoder."""
    return cross_decoders.step_of(model.decoder)


Step = step_of


def inputs(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments."""
    return {"pixel_values": batch["pixel_values"], "decoder_input_ids": batch["decoder_input_ids"], "use_cache": False}


def prompt_has_start(config: Mapping[str, Any]) -> bool:
    """Whether a prompt begins with its own start token, as Donut's tasks do; this is transformers' rule in `generate()`."""
    return "donut" in config["encoder"]["model_type"].lower()


def prompt_inputs(_config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The prompt for `generate()`, which puts the start token before it."""
    ids = modules.plain_ids(tokenizer, prompt)
    return {"decoder_input_ids": ids} if ids else {}
