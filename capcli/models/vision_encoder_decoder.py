"""VisionEncoderDecoderModel (ViT, DeiT, BEiT, Swin, SwinV2 with GPT-2 or BERT) as the decode core sees it: encode and step.

Both are transformers' own modules. What is added is a cache that writes into a slot's pool and an attention function that serves
a few query rows on long keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from capcli.models.cache import pool_cache

ANY_SIZE = ("swin", "swinv2")  # encoders that take images of other sizes than they were trained on


class Encode(nn.Module):
    """Pixels to memory: rescale, normalise, vision encoder, and the projection to every decoder layer's keys and values."""

    def __init__(self, model: PreTrainedModel, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        whole: Any = model
        self.encoder: nn.Module = whole.encoder
        self.decoder: nn.Module = whole.decoder
        self.project: nn.Module = getattr(whole, "enc_to_dec_proj", None) or nn.Identity()
        self.rescale = rescale
        self.divisor = exact_divisor(rescale)
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8 [E, h, w, 3] -> keys and values of every layer in turn, 2 x layers of [E, H, M, D]."""
        seen = self.project(self.encoder(pixel_values=self.normalise(pixels)).last_hidden_state)
        return tuple(t for layer in cross_layers(self.decoder) for t in keys_and_values(layer, seen))

    def normalise(self, pixels: Tensor) -> Tensor:
        """To the bit as the processors of transformers, which multiply in float64 and go on in float32; [E, 3, h, w]."""
        divisor = self.divisor
        x = (pixels.double() * self.rescale).float() if divisor is None else pixels.float() / divisor
        x = (x - self.mean.float()) / self.std.float()
        return x.permute(0, 3, 1, 2).to(next(self.encoder.parameters()).dtype)


def exact_divisor(rescale: float) -> float | None:
    """A float32 by which every pixel value divides to what the product in float64 gives; None where there is none.

    For 1/255 there is, so neither a graph nor a GPU needs float64 for it.
    """
    values = torch.arange(256, dtype=torch.uint8)
    divisor = float(torch.tensor(1 / rescale, dtype=torch.float32)) if rescale else 0.0
    same = divisor and torch.equal(values.float() / divisor, (values.double() * rescale).float())
    return divisor if same else None


class Step(nn.Module):
    """One pass of the decoder: rows are query positions of one sequence, so all of a slot's rows read its memory once."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        whole: Any = model
        self.decoder: nn.Module = whole.decoder

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        at: Tensor,
        visible: Tensor,
        memory: Sequence[Tensor],
        pool: Sequence[Tensor],
    ) -> Tensor:
        """tokens and position [S, Q], at [S] (the entry where Q new ones go), visible bool [S, Q, N] -> logits [S, Q, V].

        memory: 2 x layers of [S, H, M, D]; pool: 2 x layers of [S, H, N, D], written in place.
        """
        return self.decode(tokens, position, visible, pool_cache(memory, pool, at))

    def decode(self, tokens: Tensor, position: Tensor, visible: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """The same, with memory and pool in a cache that says how entries are written."""
        own: Any = cache.self_attention_cache.layers[0]
        cross: Any = cache.cross_attention_cache.layers[0]
        seen, hidden = own.keys.new_zeros(()), own.keys.new_full((), torch.finfo(own.keys.dtype).min)
        mask = torch.where(visible, seen, hidden)
        out = self.decoder(
            input_ids=tokens,
            position_ids=position,
            attention_mask=mask[:, None],
            past_key_values=cache,
            # only its presence and its length count: the cross layers are filled
            encoder_hidden_states=cross.keys[:, 0],
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits


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
    return tuple(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (keys, values))
