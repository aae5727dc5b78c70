"""How long and how various captions are, which no reference is needed for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

REPEATED = (2, 3, 4)
DISTINCT = (1, 2)


def variety(captions: Collection[str]) -> dict[str, float]:
    """Figures about tokenized captions, of which there is at least one.

    `words_mean`, `words_min`, `words_max`: their lengths in tokens, punctuation not counted. `distinct_captions` is how
    many different ones there are, `distinct_share` that number per caption. `repeated_N` is the share of captions that
    say some N-gram twice. `distinct_N` is distinct-N of Li et al. (2016, "A Diversity-Promoting Objective Function for
    Neural Conversation Models"): different N-grams per N-gram said, over all captions; 0 where none is long enough.
    """
    said = [caption.split() for caption in captions]
    lengths = list(map(len, said))
    figures: dict[str, float] = {
        "words_mean": sum(lengths) / len(said),
        "words_min": min(lengths),
        "words_max": max(lengths),
        "distinct_captions": len(set(captions)),
        "distinct_share": len(set(captions)) / len(said),
    }
    for n in REPEATED:
        figures[f"repeated_{n}"] = sum(repeats(words, n) for words in said) / len(said)
    for n in DISTINCT:
        counts = Counter(gram for words in said for gram in grams(words, n))
        figures[f"distinct_{n}"] = len(counts) / max(1, counts.total())
    return figures


def grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]


def repeats(words: list[str], n: int) -> bool:
    """Whether some n-gram is said twice."""
    found = grams(words, n)
    return len(set(found)) < len(found)
