"""GIT (GitForCausalLM, Wang et al., 2022): image tokens and words are one sequence, so an image is its slot's prefix.

Image tokens see each other, words see all of the image and the words before. Its decoder computes its attention itself.
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
inputs = modules.image_and_words


class Encode(modules.Encode):
    """Pixels to prefix: the image tokens go through the decoder's layers once, for what they see is only each other."""

    prefixed = True

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.git.image_encoder, rescale, mean, std)
        self.project: nn.Module = whole.git.visual_projection
        self.layers: Any = whole.git.encoder

    def remember(self, seen: Tensor) -> tuple[Tensor, ...]:
        cache = keeping_cache(len(self.layers.layer))
        self.layers(self.project(seen), attention_mask=None, past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        return tuple(t for layer in layers for t in (layer.keys, layer.values))


class Step(modules.Step):
    """One pass of the decoder over words, whose positions begin at 0 after any image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = self.decoder.config
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size

    def say(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        git = self.decoder.git
        words = git.embeddings(input_ids=tokens, position_ids=position)
        out = git.encoder(words, attention_mask=mask, past_key_values=cache.self_attention_cache, use_cache=True)
        logits: Tensor = self.decoder.output(out.last_hidden_state)
        return logits
