"""Words on an image (tags) as the encoder of a tagged captioner reads them, in training and in captioning alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from capcli.decoding.settings import NO_WORD
from capcli.models.build import quiet_transformers


def tag_ids(tokenizer: Any, texts: Sequence[str], count: int) -> list[tuple[int, ...]]:
    """Of each text the ids of its first words, `count` of them, with NO_WORD where there are fewer.

    Text that reads like a special token is never one.
    """
    if not texts:
        return []
    with quiet_transformers():
        rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [(*row[:count], *(NO_WORD,) * (count - len(row))) for row in rows]
