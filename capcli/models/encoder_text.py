"""Text that an encoder reads in addition to the image: tags, and gaps for the decoder to fill (T5's sentinel tokens)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from capcli.decoding.settings import NO_TOKEN
from capcli.models.checkpoint import quiet_transformers

GAP = re.compile(r"<extra_id_\d+>")


def gap_names(tokenizer: Any) -> dict[int, str]:
    """The sentinel tokens of a tokenizer: id -> name."""
    return {i: name for name, i in tokenizer.get_vocab().items() if GAP.fullmatch(name)}


def with_gaps(tokenizer: Any, ids: Iterable[int], names: Mapping[int, str]) -> str:
    """Decodes ids, with spaces around sentinel tokens (`names`); other special tokens are left out."""
    parts = []
    for name, run in groupby(ids, names.get):
        kept = list(run)
        parts += [name] * len(kept) if name else [str(tokenizer.decode(kept, skip_special_tokens=True)).strip()]
    return " ".join(part for part in parts if part)


def fillings(text: str) -> dict[str, str]:
    """The text for each gap in an answer, by the gap's name; of a repeated gap, the first text."""
    texts = [part.strip() for part in GAP.split(text)[1:]]
    found: dict[str, str] = {}
    for name, filling in zip(GAP.findall(text), texts, strict=True):
        found.setdefault(name, filling)
    return found


def tag_ids(tokenizer: Any, texts: Sequence[str], count: int) -> list[tuple[int, ...]]:
    """The first `count` token ids of each text, padded with NO_TOKEN. Special tokens are encoded as ordinary text."""
    if not texts:
        return []
    with quiet_transformers():
        rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [(*row[:count], *(NO_TOKEN,) * (count - len(row))) for row in rows]
