"""The output of Donut as JSON: its fields are tokens such as <s_price> and </s_price>."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

START = re.compile(r"<s_[^>]*>")


class FieldDecoder:
    """Decodes the ids of a tokenizer that has field tokens, as transformers' DonutProcessor does."""

    def __init__(self, tokenizer: Any) -> None:
        # imported here: a tokenizer seldom has fields
        from transformers import DonutProcessor
        from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil

        self.tokenizer = tokenizer
        processor: Any = DonutProcessor
        self.processor = processor(image_processor=DonutImageProcessorPil(), tokenizer=tokenizer)
        self.outside = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}

    @classmethod
    def of(cls, tokenizer: Any) -> FieldDecoder | None:
        """The decoder for a tokenizer; None where its added tokens have no field with a start and an end."""
        added = set(tokenizer.get_added_vocab())
        fields = (name for name in added if START.fullmatch(name))
        return cls(tokenizer) if any(f"</{name[1:]}" in added for name in fields) else None

    def json(self, ids: Iterable[int]) -> str | None:
        """The fields in `ids` as JSON in one line; None where there are none, as in the text of a page."""
        text = self.tokenizer.decode([i for i in ids if i not in self.outside])
        if not START.search(text):
            return None
        return json.dumps(self.processor.token2json(text), ensure_ascii=False)
