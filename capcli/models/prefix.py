"""Prefix captioner: image tokens before the text of a GPT-2, in one causal sequence (Mokady et al., Eichenberg et al., 2021).

The encoder's features are averaged over `image_tokens` cells of the image and projected to the width of the GPT-2: positions 0 to
image_tokens - 1. The image's tags may follow, in `tag_tokens` positions of which unused ones are hidden; then the start token and
the caption. Image tokens attend only to earlier ones, as in all that a GPT-2 was trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, GenerationMixin, GPT2LMHeadModel, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutput

from capcli.decoding.settings import NO_TOKEN
from capcli.models import modules
from capcli.models.cache import keeping_cache
from capcli.models.encoders import (
    feature_width,
    flatten_features,
    grid,
    image_size_of,
    register_architecture,
    sub_config,
)

LOADER = "AutoModel"
ENCODER, DECODER = ("encoder",), ("decoder",)
generation = modules.own_generation


class PrefixConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """`vision_config` is the encoder's config, `text_config` the GPT-2's; `decoder_start_token_id` begins a caption."""

    model_type = "prefix-captioner"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012
    has_no_defaults_at_init = True

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        image_tokens: int = 10,
        tag_tokens: int = 0,
        decoder_start_token_id: int | None = None,
        **others: Any,
    ) -> None:
        self.vision_config, self.text_config = sub_config(vision_config, "resnet"), sub_config(text_config, "gpt2")
        self.image_tokens, self.tag_tokens = image_tokens, tag_tokens
        self.decoder_start_token_id = decoder_start_token_id
        ids = {name: getattr(self.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ties = {"tie_word_embeddings": self.text_config.tie_word_embeddings}
        super().__init__(**ids | ties | others)


class PrefixCaptioner(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """An image encoder and a GPT-2. `generate(pixel_values)` captions with transformers' search, without a cache."""

    config_class = PrefixConfig
    config: PrefixConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"decoder.lm_head.weight": "decoder.transformer.wte.weight"}  # noqa: RUF012

    def __init__(
        self, config: PrefixConfig, encoder: PreTrainedModel | None = None, decoder: GPT2LMHeadModel | None = None
    ) -> None:
        super().__init__(config)
        auto: Any = AutoModel
        text: Any = config.text_config
        self.encoder: Any = encoder or auto.from_config(config.vision_config)
        self.decoder: Any = decoder or GPT2LMHeadModel(text)
        # the configs of the given parts replace those in this config
        self.config.vision_config, self.config.text_config = self.encoder.config, self.decoder.config
        self.project = nn.Linear(feature_width(self.encoder.config), self.decoder.config.n_embd)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the projection; the parts are initialised by their own classes."""
        if module is self.project:
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.decoder.get_input_embeddings()
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.decoder.get_output_embeddings()
        return head

    def image(self, pixel_values: Tensor) -> Tensor:
        """[E, 3, h, w] -> image tokens [E, image_tokens, n_embd], before position embeddings."""
        features = self.encoder(pixel_values=pixel_values).last_hidden_state
        rows, columns = grid(self.encoder.config, features, *pixel_values.shape[2:])
        features = flatten_features(features)
        features = features[:, features.shape[1] - rows * columns :]  # without class tokens, which come first
        means: Tensor = features.new_tensor(pooling(self.config.image_tokens, rows, columns))
        tokens: Tensor = self.project(means @ features)
        return tokens

    def prefix(self, pixel_values: Tensor, tags: Tensor | None) -> tuple[Tensor, Tensor]:
        """Image and tags (ids [E, tag_tokens], NO_TOKEN where unused) -> embeddings [E, M, n_embd] and bool [E, M]: visible."""
        image = self.image(pixel_values)
        visible = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        if not self.config.tag_tokens:
            return image, visible
        if tags is None:
            tags = torch.full((len(image), self.config.tag_tokens), NO_TOKEN, device=image.device)
        text = self.get_input_embeddings()(tags.clamp(min=0))
        return torch.cat((image, text), 1), torch.cat((visible, tags >= 0), 1)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        tags: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """pixel_values [B, 3, h, w], input_ids [B, T] (the start token first), tags [B, tag_tokens] -> logits [B, T, V]."""
        prefix, visible = self.prefix(pixel_values, tags)
        x = torch.cat((prefix, self.get_input_embeddings()(input_ids)), 1)
        visible = torch.cat((visible, visible.new_ones(input_ids.shape)), 1)
        position = torch.arange(x.shape[1], device=x.device)[None]
        out = self.decoder.transformer(
            inputs_embeds=x, position_ids=position, attention_mask=causal(visible, x.dtype), use_cache=False
        )
        return CausalLMOutput(logits=self.decoder.lm_head(out.last_hidden_state[:, -input_ids.shape[1] :]))

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, pixel_values: Tensor, input_ids: Tensor | None = None, tags: Tensor | None = None, **search: Any
    ) -> Any:
        """transformers' generate() for images [B, 3, h, w]; captions start with the start token or with input_ids [B, T]."""
        if input_ids is None:
            input_ids = pixel_values.new_full(
                (len(pixel_values), 1), int(self.config.decoder_start_token_id or 0), dtype=torch.long
            )
        given: dict[str, Any] = {"pixel_values": pixel_values} | ({} if tags is None else {"tags": tags})
        return super().generate(input_ids, **search | given | {"use_cache": False})  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, pixel_values: Tensor, tags: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "pixel_values": pixel_values, "tags": tags}


def causal(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [E, N] -> the additive causal mask [E, 1, N, N] that also hides what is not visible."""
    count = visible.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool, device=visible.device).tril() & visible[:, None]
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(allowed, zero, torch.full_like(zero, torch.finfo(dtype).min))[:, None]


@cache
def pooling(tokens: int, rows: int, columns: int) -> list[list[float]]:
    """The matrix [tokens, rows * columns] of adaptive average pooling over `cells`, in row-major order.

    As a matrix product, pooling can be exported at any size and has a deterministic gradient.
    """
    down, across = cells(tokens, rows, columns)
    vertical, horizontal = bands(down, rows), bands(across, columns)
    return [
        [v * h for v in down_weights for h in across_weights]
        for down_weights in vertical
        for across_weights in horizontal
    ]


def bands(count: int, length: int) -> list[list[float]]:
    """The weights [count, length] of means over `count` bands that cover `length` positions."""
    ends = [((i * length) // count, -((-(i + 1) * length) // count)) for i in range(count)]
    return [[1 / (end - start) if start <= x < end else 0.0 for x in range(length)] for start, end in ends]


def cells(tokens: int, rows: int, columns: int) -> tuple[int, int]:
    """The number of cells down and across: as square as possible, more across than down on a tie; 2 x 5 for 10 on a square.

    A prime number gives vertical stripes, as captions distinguish left and right more often than above and below.
    """
    pairs = [(down, tokens // down) for down in range(1, tokens + 1) if tokens % down == 0]
    return min(pairs, key=lambda pair: (round(abs(math.log(rows * pair[1] / (columns * pair[0]))), 9), pair[0]))


class Encode(modules.Encode):
    """Pixels and tags to prefix: keys and values of every layer of the GPT-2."""

    prefixed = True
    any_size = True

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.encoder, rescale, mean, std, size=image_size_of(whole.encoder.config))
        self.whole = whole

    def forward(self, pixels: Tensor, encoder_ids: Tensor | None = None) -> tuple[Tensor, ...]:
        """uint8 [E, h, w, 3] and tags [E, tag_tokens] -> 2 x layers of [E, H, image_tokens + tag_tokens, D]."""
        return self.prefill(*self.whole.prefix(self.normalise(pixels), encoder_ids))

    def prefill(self, x: Tensor, visible: Tensor) -> tuple[Tensor, ...]:
        """Embeddings [E, M, n_embd] and bool [E, M] -> their keys and values, 2 x layers of [E, H, M, D]."""
        transformer = self.whole.decoder.transformer
        cache = keeping_cache(len(transformer.h))
        position = torch.arange(x.shape[1], device=x.device)[None]
        mask = causal(visible, x.dtype)
        transformer(inputs_embeds=x, position_ids=position, attention_mask=mask, past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        return tuple(t for layer in layers for t in (layer.keys, layer.values))

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        """Those of image tokens [E, image_tokens, n_embd] without tags."""
        return self.prefill(features, torch.ones(features.shape[:2], dtype=torch.bool, device=features.device))


class Step(modules.Step):
    """One pass of the GPT-2 over text tokens, whose positions follow those of image and tags."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.decoder)
        self.prefix_length = whole.config.image_tokens + whole.config.tag_tokens
        config = whole.config.text_config
        self.positions, self.vocabulary = config.n_positions - self.prefix_length, config.vocab_size

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        out = self.decoder.transformer(
            input_ids=tokens,
            position_ids=position + self.prefix_length,
            attention_mask=mask,
            past_key_values=cache.self_attention_cache,
            use_cache=True,
        )
        logits: Tensor = self.decoder.lm_head(out.last_hidden_state)
        return logits


def inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments; `tags` are padded to tag_tokens."""
    tags, room = batch["encoder_ids"], model.config.tag_tokens
    tags = nn.functional.pad(tags.clamp(min=NO_TOKEN), (0, room - tags.shape[1]), value=NO_TOKEN) if room else None
    return {"pixel_values": batch["pixel_values"], "input_ids": batch["decoder_input_ids"], "tags": tags}


register_architecture(PrefixConfig, PrefixCaptioner)


def prompt_inputs(config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The start token and the prompt for `generate()`."""
    return {"input_ids": [config.decoder_start_token_id, *modules.plain_ids(tokenizer, prompt)]}
