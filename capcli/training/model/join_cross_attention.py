"""An encoder and a decoder that attends to what it sees: transformers' VisionEncoderDecoderModel."""

from __future__ import annotations

from typing import Any

import torch
from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from capcli.models.checkpoint import quiet_transformers
from capcli.models.vision_encoder_decoder import ANY_SIZE
from capcli.options import ModelOptions
from capcli.training.model.embeddings import extend_embeddings, renew_embeddings, token_count
from capcli.training.model.joining import Joined, Parts
from capcli.training.model.pretrained import (
    CROSS_ATTENTION,
    HEADS,
    Config,
    PretrainedPart,
    config_of,
    make_part,
    seeded,
)

FAMILY, ASKED = "vision-encoder-decoder", False


def any_size(encoder: Config) -> bool:
    return encoder.kind in ANY_SIZE


def room(decoder: Config, options: ModelOptions) -> int:  # noqa: ARG001
    positions: int = config_of(decoder).max_position_embeddings
    return positions


def join(parts: Parts) -> Joined:
    encoder, decoder, new = both_parts(parts, cross=True)
    with seeded(parts.seed, "projection"), quiet_transformers():
        config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
        model = VisionEncoderDecoderModel(config=config, encoder=encoder, decoder=decoder)
    return Joined(model, parts.specials, new)


def both_parts(parts: Parts, *, cross: bool) -> tuple[Any, Any, dict[str, str]]:
    """Encoder, decoder with or without cross-attention, in float32; what of them is random, with a line on it."""
    speaking, new = speaking_part(parts, cross=cross)
    encoder, decoder = make_part(parts.encoder, parts.seed).model, speaking.model
    for part in (encoder, decoder):
        part.config.dtype = torch.float32
    return encoder, decoder, new


def speaking_part(parts: Parts, *, cross: bool) -> tuple[PretrainedPart, dict[str, str]]:
    """The decoder with an embedding for every token, and cross-attention or none; what of it is random, with a line on it."""
    decoder, specials, seed = parts.decoder, parts.specials, parts.seed
    changes: dict[str, Any] = {"is_decoder": True, "add_cross_attention": cross, "cross_attention_hidden_size": None}
    count = token_count(parts.tokenizer)
    if decoder.files is None:
        ids = {"bos_token_id": specials.start, "eos_token_id": specials.end, "pad_token_id": specials.pad}
        part = make_part(decoder, seed, **changes, **ids, vocab_size=count)
        return part, {"decoder": "the decoder has new random weights"}
    part = make_part(decoder, seed, **changes)
    new: dict[str, str] = {}
    if _lacks(part, CROSS_ATTENTION):
        new["cross-attention"] = ""  # as ever, unless it was a captioner's
    if _lacks(part, HEADS):
        new["embeddings"] = "the decoder's output layer is new: its weights have none"
    if parts.foreign:
        renew_embeddings(part.model, count, seed)
        new["embeddings"] = f"the decoder's embeddings are new, {count:,} of them: the tokenizer is not its own"
    else:
        extend_embeddings(part.model, count, seed)
    return part, new


def _lacks(part: PretrainedPart, signs: tuple[str, ...]) -> bool:
    return any(sign in name for name in part.missing for sign in signs)
