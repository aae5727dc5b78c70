"""An image encoder and a T5 -> an untrained VisionT5, the tokens for gaps in a text in its vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import AddedToken

from capcli.models.checkpoint import quiet_transformers
from capcli.models.vision_t5 import ANY_SIZE, POSITIONS, VisionT5, VisionT5Config
from capcli.options import ModelOptions
from capcli.training.model.embeddings import extend_embeddings, renew_embeddings, token_count
from capcli.training.model.joining import Joined, Parts
from capcli.training.model.pretrained import Config, make_part, seeded

FAMILY, ASKED = VisionT5Config.model_type, True
GAPS = 100  # tokens <extra_id_0> to <extra_id_99>, each the place of words that are to be found


def any_size(encoder: Config) -> bool:
    return encoder.kind in ANY_SIZE


def room(decoder: Config, options: ModelOptions) -> int:  # noqa: ARG001
    return POSITIONS


def join(parts: Parts) -> Joined:
    decoder, reader, tokenizer, seed = parts.decoder, parts.reader, parts.tokenizer, parts.seed
    add_gaps(tokenizer)
    specials = replace(parts.specials, start=parts.specials.pad)  # every T5 begins so
    count = token_count(tokenizer)
    ids: dict[str, Any] = {
        "eos_token_id": specials.end,
        "pad_token_id": specials.pad,
        "decoder_start_token_id": specials.start,
    }
    new: dict[str, str] = {}
    if decoder.files is None:
        speaking = make_part(decoder, seed, **ids, vocab_size=count).model
        new["decoder"] = "the decoder has new random weights"
    else:
        speaking = make_part(decoder, seed).model
        if parts.foreign:
            renew_embeddings(speaking, count, seed)
            new["embeddings"] = f"the decoder's embeddings are new, {count:,} of them: the tokenizer is not its own"
        extend_embeddings(speaking, count, seed)
    asked = None
    if reader is not None:
        asked, fresh = asking_part(reader, count, seed, estranged=parts.estranged)
        new |= fresh
    seeing = make_part(parts.encoder, seed).model
    for part in (seeing, speaking, asked):
        if part is not None:
            part.config.dtype = torch.float32
    with seeded(seed, "projection"), quiet_transformers():
        # copies: what becomes a model's config loses how its parts attend
        configs: list[Any] = [None if part is None else part.config.to_dict() for part in (seeing, speaking, asked)]
        config = VisionT5Config(*configs, **ids)
        return Joined(VisionT5(config, seeing, speaking, asked), specials, new)


def asking_part(reader: Config, count: int, seed: int, *, estranged: bool) -> tuple[Any, dict[str, str]]:
    """What reads the question first, with an embedding for every token; what of it is random, with a line on it."""
    reader = replace(reader, kind="t5-encoder")
    if reader.files is None:
        lines = {"question-encoder": "the question encoder has new random weights"}
        return make_part(reader, seed, vocab_size=count).model, lines
    model, lines = make_part(reader, seed).model, {}
    if estranged:
        renew_embeddings(model, count, seed)
        lines["question-embeddings"] = f"the question encoder's embeddings are new, {count:,} of them"
    extend_embeddings(model, count, seed)
    return model, lines


def add_gaps(tokenizer: Any) -> None:
    """The tokens <extra_id_n> where a tokenizer lacks them, as T5's own numbers them: the last first."""
    known = tokenizer.get_vocab()
    names = [f"<extra_id_{number}>" for number in reversed(range(GAPS))]
    lacking = [name for name in names if name not in known]
    if lacking:
        # the space before one is no word of a prompt's
        tokens = [AddedToken(name, lstrip=True, normalized=False, special=True) for name in lacking]
        tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
