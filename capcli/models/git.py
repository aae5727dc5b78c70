"""GIT (GitForCausalLM, Wang et al., 2022): image tokens and text tokens are one sequence, so an image is its slot's prefix.

Image tokens attend to each other, text tokens to the whole image and to earlier text. The decoder's attention cannot be chosen in
transformers, so `use_attention` has no effect on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from capcli.models import modules
from capcli.models.cache import keeping_cache

LOADER = "GitForCausalLM"
ENCODER, DECODER = ("git.image_encoder",), ("git.embeddings", "git.encoder", "output")
generation = modules.own_generation
inputs = modules.decoder_only_inputs


class Encode(modules.Encode):
    """Pixels to prefix: image tokens attend only to each other, so they pass through the decoder's layers once."""

    prefixed = True

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.git.image_encoder, rescale, mean, std)
        self.project: nn.Module = whole.git.visual_projection
        self.layers: Any = whole.git.encoder

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        cache = keeping_cache(len(self.layers.layer))
        self.layers(self.project(features), attention_mask=None, past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        return tuple(t for layer in layers for t in (layer.keys, layer.values))


class Step(modules.Step):
    """One pass of the decoder over text tokens, whose positions start at 0 after the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.decoder.config
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        git = self.decoder.git
        x = git.embeddings(input_ids=tokens, position_ids=position)
        out = git.encoder(x, attention_mask=mask, past_key_values=cache.self_attention_cache, use_cache=True)
        logits: Tensor = self.decoder.output(out.last_hidden_state)
        return logits


def prompt_inputs(config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The prompt for `generate()`, with the start token that it would else add."""
    ids = modules.plain_ids(tokenizer, prompt)
    return {"input_ids": [config.bos_token_id, *ids]} if ids else {}
