"""Length and diversity of captions, measured without references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

REPEATED = (2, 3, 4)
DISTINCT = (1, 2)


def diversity(captions: Collection[str]) -> dict[str, float]:
    """Figures for at least one tokenized caption.

    `words_mean`, `words_min`, `words_max`: lengths in tokens, without punctuation. `distinct_captions`: the number of
    different captions; `distinct_share`: divided by the number of captions. `repeated_N`: the share of captions that
    contain some N-gram twice. `distinct_N`: distinct-N of Li et al. (2016, "A Diversity-Promoting Objective Function for
    Neural Conversation Models"), different N-grams divided by all N-grams; 0 where no caption is long enough.
    """
    tokenized = [caption.split() for caption in captions]
    lengths = list(map(len, tokenized))
    figures: dict[str, float] = {
        "words_mean": sum(lengths) / len(tokenized),
        "words_min": min(lengths),
        "words_max": max(lengths),
        "distinct_captions": len(set(captions)),
        "distinct_share": len(set(captions)) / len(tokenized),
    }
    for n in REPEATED:
        figures[f"repeated_{n}"] = sum(repeats(words, n) for words in tokenized) / len(tokenized)
    for n in DISTINCT:
        counts = Counter(gram for words in tokenized for gram in grams(words, n))
        figures[f"distinct_{n}"] = len(counts) / max(1, counts.total())
    return figures


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def repeats(words: list[str], n: int) -> bool:
    """Whether some n-gram occurs twice."""
    found = grams(words, n)
    return len(set(found)) < len(found)
