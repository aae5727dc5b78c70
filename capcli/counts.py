"""How many of something there are, in words for people."""

from __future__ import annotations


def counted(number: int, word: str) -> str:
    """The number with its word, as many as it takes."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"
