"""What every family's encode and step are: the modules that the decode core runs and that are exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from capcli.models.cache import pool_cache


class Encode(nn.Module, ABC):
    """Pixels to what the decoder needs of an image: rescale, normalise, vision encoder, keys and values of every decoder layer.

    `encoder` is transformers' vision encoder and `size` the image size that its config names. What is left of an image is its
    memory, for cross-attention; with `prefixed` it is its prefix: the first entries of its slot's pool. An encoder that is asked
    a question takes its ids [E, W] as well; where images are prefixes its words are the last entries, hidden for ids below 0.
    """

    prefixed = False
    any_size = False  # whether the encoder takes images of other sizes than `size`

    def __init__(
        self,
        encoder: nn.Module,
        rescale: float,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        config: Any = encoder.config
        self.size: int | Sequence[int] = size or config.image_size
        self.rescale = rescale
        self.divisor = exact_divisor(rescale)
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """uint8 [E, h, w, 3] -> keys and values of every layer in turn, 2 x layers of [E, H, M, D]."""
        return self.remember(self.encoder(pixel_values=self.normalise(pixels)).last_hidden_state)

    @abstractmethod
    def remember(self, seen: Tensor) -> tuple[Tensor, ...]:
        """What the vision encoder saw [E, M, C] -> keys and values of every decoder layer."""

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


class Step(nn.Module, ABC):
    """One pass of the decoder: rows are query positions of one sequence, so all of a slot's rows read its memory once.

    `decoder` is transformers' model; it holds sequences of `positions` tokens, prompt and caption, of `vocabulary` kinds.
    """

    positions: int
    vocabulary: int

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder

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

        memory: 2 x layers of [S, H, M, D], none where images are prefixes; pool: 2 x layers of [S, H, N, D], written in place.
        """
        return self.decode(tokens, position, visible, pool_cache(memory, pool, at))

    def decode(self, tokens: Tensor, position: Tensor, visible: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """The same, with memory and pool in a cache that says how entries are written."""
        own: Any = cache.self_attention_cache.layers[0]
        seen, hidden = own.keys.new_zeros(()), own.keys.new_full((), torch.finfo(own.keys.dtype).min)
        return self.say(tokens, position, torch.where(visible, seen, hidden)[:, None], cache)

    @abstractmethod
    def say(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """Logits [S, Q, V] under an additive mask [S, 1, Q, N]."""


class CrossStep(Step):
    """One pass of a decoder with cross-attention that takes positions, a 4-D mask and a cache as they are handed to it."""

    def say(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        cross: Any = cache.cross_attention_cache.layers[0]
        out = self.decoder(
            input_ids=tokens,
            position_ids=position,
            attention_mask=mask,
            past_key_values=cache,
            # only its presence and its length count: the cross layers are filled
            encoder_hidden_states=cross.keys[:, 0],
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits


def own_generation(_config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What `generate()` of most families goes by, as `Family.generation` says it: the model's generation_config."""
    return own


def image_and_words(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What a model of one stream of words learns from, as `Family.inputs` says it."""
    return {"pixel_values": batch["pixel_values"], "input_ids": batch["decoder_input_ids"], "use_cache": False}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[E, M, H * D] -> [E, H, M, D]."""
    parts: Tensor = x.unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
    return parts.transpose(1, 2)
