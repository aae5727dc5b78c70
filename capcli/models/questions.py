"""Gaps in a text: <extra_id_0>, <extra_id_1>, ... in a question, and in the answer each before the words for it (T5's way)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

GAP = re.compile(r"<extra_id_\d+>")


def gap_names(tokenizer: Any) -> dict[int, str]:
    """The gaps that a tokenizer knows, by id."""
    return {i: name for name, i in tokenizer.get_vocab().items() if GAP.fullmatch(name)}


def with_gaps(tokenizer: Any, ids: Iterable[int], names: Mapping[int, str]) -> str:
    """The text of ids, a space around each gap's name; other special tokens are left out."""
    parts = []
    for name, run in groupby(ids, names.get):
        kept = list(run)
        parts += [name] * len(kept) if name else [str(tokenizer.decode(kept, skip_special_tokens=True)).strip()]
    return " ".join(part for part in parts if part)


def fillings(text: str) -> dict[str, str]:
    """What an answer puts into each gap, by the gap's name; of a gap that comes twice the first time counts."""
    words = [part.strip() for part in GAP.split(text)[1:]]
    found: dict[str, str] = {}
    for name, said in zip(GAP.findall(text), words, strict=True):
        found.setdefault(name, said)
    return found
