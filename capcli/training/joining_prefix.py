"""An encoder and a GPT-2, joined so that the image stands before the words."""

from __future__ import annotations

from typing import Any

import torch

from capcli.errors import UsageError
from capcli.models.build import quiet_transformers
from capcli.models.files import JOINED
from capcli.models.prefix import PrefixCaptioner, PrefixConfig
from capcli.training.parts import Config, seeded


def refuse_decoder(decoder: Config) -> None:
    """Raises UsageError for one that takes no prefix."""
    _, _, decoders = JOINED[PrefixConfig.model_type]
    if decoder.kind not in decoders:
        raise UsageError(
            f"{decoder.title} is a {decoder.kind}; an image is put before the words of a {' or '.join(decoders)} only"
        )


def join_prefix(encoder: Any, decoder: Any, image_tokens: int, tag_tokens: int, seed: int) -> PrefixCaptioner:
    """The captioner of the two parts; its projection is new, and the seed decides its weights.

    Raises UsageError where image and tags leave no room for words.
    """
    holds = decoder.config.n_positions
    if image_tokens + tag_tokens >= holds:
        raise UsageError(
            f"{image_tokens} image tokens and {tag_tokens} of tags leave no room for words: the decoder holds {holds}"
        )
    for part in (encoder, decoder):
        part.config.dtype = torch.float32
    with seeded(seed, "projection"), quiet_transformers():
        config = PrefixConfig(encoder.config.to_dict(), decoder.config.to_dict(), image_tokens, tag_tokens)
        return PrefixCaptioner(config, encoder, decoder)
