"""VisionEncoderDecoderModel: ViT, DeiT, BEiT, Swin or SwinV2 with GPT-2 or BERT.

Encoder and decoder are transformers' modules; the cache writes into the slots' pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from capcli.models import modules
from capcli.models.modules import split_heads

LOADER = "VisionEncoderDecoderModel"
ENCODER, DECODER = ("encoder",), ("decoder",)
generation = modules.own_generation
ANY_SIZE = ("swin", "swinv2")  # encoders that accept images of another size than the config's


class Encode(modules.Encode):
    """Pixels to memory, through the projection between an encoder and a decoder of different widths."""

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.encoder, rescale, mean, std)
        self.any_size = whole.encoder.config.model_type in ANY_SIZE
        self.decoder: nn.Module = whole.decoder
        self.project: nn.Module = getattr(whole, "enc_to_dec_proj", None) or nn.Identity()

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for layer in cross_layers(self.decoder) for t in layer_memory(layer, self.project(features)))


class Step(modules.CrossStep):
    """One pass of GPT-2 or BERT."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.decoder)
        config = whole.config.decoder
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size


def inputs(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments."""
    return {"pixel_values": batch["pixel_values"], "decoder_input_ids": batch["decoder_input_ids"], "use_cache": False}


def cross_layers(decoder: Any) -> list[nn.Module]:
    """The cross-attention modules of the decoder's layers, in order."""
    if decoder.config.model_type == "gpt2":
        return [block.crossattention for block in decoder.transformer.h]
    return [layer.crossattention.self for layer in decoder.bert.encoder.layer]


def layer_memory(layer: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's keys and values, [E, H, M, D] each, of `features` [E, M, C]."""
    if hasattr(layer, "c_attn"):
        keys, values = layer.c_attn(features).split(layer.split_size, 2)
        heads = layer.num_heads
    else:
        keys, values = layer.key(features), layer.value(features)
        heads = layer.num_attention_heads
    return split_heads(keys, heads), split_heads(values, heads)


def prompt_inputs(_config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The prompt for `generate()`, which puts the start token before it."""
    ids = modules.plain_ids(tokenizer, prompt)
    return {"decoder_input_ids": ids} if ids else {}
