"""The base classes of every family's two modules, encode and step, which the runtimes run and `capcli export` exports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from capcli.models.cache import pool_cache


class Encode(nn.Module, ABC):
    """Pixels -> keys and values of every decoder layer: rescale, normalise, vision encoder, projections.

    `encoder` is transformers' vision encoder; `size` is the image size of its config. The result is an image's memory, for
    cross-attention, or, with `prefixed`, its prefix: the first entries of its slot's pool. An encoder that reads text also takes
    token ids [E, W]; in a prefix they are the last W entries, which are hidden where an id is negative.
    """

    prefixed = False
    any_size = False  # whether the encoder accepts images of other sizes than `size`

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
        return self.keys_values(self.encoder(pixel_values=self.normalise(pixels)).last_hidden_state)

    @abstractmethod
    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        """The encoder's features [E, M, C] -> keys and values of every decoder layer in turn, 2 x layers of [E, H, M, D]."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [E, h, w, 3] -> [E, 3, h, w], bit-identical to transformers' processors: float64 to rescale, then float32."""
        divisor = self.divisor
        x = (pixels.double() * self.rescale).float() if divisor is None else pixels.float() / divisor
        x = (x - self.mean.float()) / self.std.float()
        return x.permute(0, 3, 1, 2).to(next(self.encoder.parameters()).dtype)


def exact_divisor(rescale: float) -> float | None:
    """A float32 divisor that gives the same float32 for every pixel value as the product with `rescale` in float64; or None.

    There is one for 1/255, so the usual processors need no float64, which is slow on a GPU.
    """
    values = torch.arange(256, dtype=torch.uint8)
    divisor = float(torch.tensor(1 / rescale, dtype=torch.float32)) if rescale else 0.0
    same = divisor and torch.equal(values.float() / divisor, (values.double() * rescale).float())
    return divisor if same else None


class Step(nn.Module, ABC):
    """One pass of the decoder. A slot's rows are query positions of one sequence, so its memory is read once for all rows.

    `decoder` is transformers' model.
    """

    positions: int  # the most tokens of a sequence, prompt and caption
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
        """tokens and position [S, Q], at [S], visible bool [S, Q, N] -> logits [S, Q, V].

        memory: 2 x layers of [S, H, M, D], none where images are prefixes. pool: 2 x layers of [S, H, N, D]; the Q new keys and
        values of slot s are written in place, from entry at[s] on.
        """
        return self.decode(tokens, position, visible, pool_cache(memory, pool, at))

    def decode(self, tokens: Tensor, position: Tensor, visible: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """`forward` with memory and pool in a cache, which implements how entries are written."""
        layer: Any = cache.self_attention_cache.layers[0]
        zero, hidden = layer.keys.new_zeros(()), layer.keys.new_full((), torch.finfo(layer.keys.dtype).min)
        return self.logits(tokens, position, torch.where(visible, zero, hidden)[:, None], cache)

    @abstractmethod
    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """Logits [S, Q, V] under an additive attention mask [S, 1, Q, N]."""


class CrossStep(Step):
    """The step of a decoder with cross-attention whose forward accepts position ids, a 4-D mask and a cache."""

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        cross: Any = cache.cross_attention_cache.layers[0]
        out = self.decoder(
            input_ids=tokens,
            position_ids=position,
            attention_mask=mask,
            past_key_values=cache,
            # only its presence and length are used: the cache's cross layers are filled
            encoder_hidden_states=cross.keys[:, 0],
            use_cache=True,
        )
        logits: Tensor = out.logits
        return logits


def own_generation(_config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`Family.generation` of most families: the model's generation_config."""
    return own


def decoder_only_inputs(_model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """`Family.inputs` of a model whose forward takes the caption as input_ids."""
    return {"pixel_values": batch["pixel_values"], "input_ids": batch["decoder_input_ids"], "use_cache": False}


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[E, M, H * D] -> [E, H, M, D]."""
    parts: Tensor = x.unflatten(-1, (heads, -1))  # type: ignore[no-untyped-call]
    return parts.transpose(1, 2)


def plain_ids(tokenizer: Any, prompt: str | None) -> list[int]:
    """The ids of a prompt without special tokens; empty for none."""
    return list(tokenizer(prompt, add_special_tokens=False)["input_ids"]) if prompt else []
