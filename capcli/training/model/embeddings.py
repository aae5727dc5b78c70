"""A decoder's embeddings: whether they mean a tokenizer's tokens, and new ones where they do not."""

from __future__ import annotations

from typing import Any

from torch import nn

from capcli.models.checkpoint import quiet_transformers
from capcli.training.model.pretrained import seeded

PADDED = 256  # a vocabulary may be rounded up so far for the hardware's sake


def token_count(tokenizer: Any) -> int:
    """One more than its highest id, which may be above its length where ids have gaps."""
    return int(max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())))


def is_foreign(tokenizer: Any, own: Any, held: int) -> bool:
    """Whether the decoder's embeddings mean other tokens than the tokenizer's.

    Of a decoder without a tokenizer only the size tells.
    """
    if own is None:
        return not 0 <= held - token_count(tokenizer) < PADDED
    vocabulary = tokenizer.get_vocab()
    return any(vocabulary.get(token) != i for token, i in own.get_vocab().items() if i < held)


def renew_embeddings(decoder: Any, count: int, seed: int) -> None:
    """Gives a decoder `count` embeddings as a new model's, and the output layer's, where those are not the same."""
    config = decoder.config
    std = getattr(config, "initializer_range", None) or config.initializer_factor  # T5 has the latter
    with seeded(seed, "embeddings"), quiet_transformers():
        decoder.resize_token_embeddings(count, mean_resizing=False)
        put_in, taken_out = decoder.get_input_embeddings(), decoder.get_output_embeddings()
        nn.init.normal_(put_in.weight, std=std)
        if taken_out is None:  # of an encoder
            return
        if taken_out.weight is not put_in.weight:
            nn.init.normal_(taken_out.weight, std=std)
        if taken_out.bias is not None:
            nn.init.zeros_(taken_out.bias)


def extend_embeddings(decoder: Any, count: int, seed: int) -> None:
    """Gives a decoder rows for tokens that were added to its tokenizer, where it has none yet."""
    if count > decoder.config.vocab_size:
        with seeded(seed, "embeddings"), quiet_transformers():
            decoder.resize_token_embeddings(count, mean_resizing=False)
