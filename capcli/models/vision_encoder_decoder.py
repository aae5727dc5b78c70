"""VisionEncoderDecoderModel (ViT, DeiT, BEiT, Swin, SwinV2 with GPT-2 or BERT) as the decode core sees it: encode and step.

Both are transformers' own modules. What is added is a cache that writes into a slot's pool and an attention function that serves
a few query rows on long keys.
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
ANY_SIZE = ("swin", "swinv2")  # encoders that take images of other sizes than they were trained on


class Encode(modules.Encode):
    """Pixels to memory, through the projection that joins encoder and decoder of unequal width."""

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.encoder, rescale, mean, std)
        self.any_size = whole.encoder.config.model_type in ANY_SIZE
        self.decoder: nn.Module = whole.decoder
        self.project: nn.Module = getattr(whole, "enc_to_dec_proj", None) or nn.Identity()

    def remember(self, seen: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for layer in cross_layers(self.decoder) for t in keys_and_values(layer, self.project(seen)))


class Step(modules.CrossStep):
    """One pass of GPT-2 or BERT."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.decoder)
        config = whole.config.decoder
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size


def inputs(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model learns from."""
    return {"pixel_values": batch["pixel_values"], "decoder_input_ids": batch["decoder_input_ids"], "use_cache": False}


def cross_layers(decoder: Any) -> list[nn.Module]:
    """The cross-attention modules, first layer first."""
    if decoder.config.model_type == "gpt2":
        return [block.crossattention for block in decoder.transformer.h]
    return [layer.crossattention.self for layer in decoder.bert.encoder.layer]


def keys_and_values(layer: Any, seen: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's memory of `seen` [E, M, C]: two of [E, H, M, D]."""
    if hasattr(layer, "c_attn"):
        keys, values = layer.c_attn(seen).split(layer.split_size, 2)
        heads = layer.num_heads
    else:
        keys, values = layer.key(seen), layer.value(seen)
        heads = layer.num_attention_heads
    return split_heads(keys, heads), split_heads(values, heads)
