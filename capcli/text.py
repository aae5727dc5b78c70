"""Names: of images, the bytes they stand for and how these are written where not every byte may stand; of options."""

from __future__ import annotations

import re
import unicodedata

_SURROGATE = re.compile("[\ud800-\udfff]")


def raw_bytes(name: str) -> bytes:
    """The bytes a name stands for; two names are the same when these are."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a UTF-16 pair, which Windows allows in names
        return name.encode("utf-8", "surrogatepass")


def is_text(name: str) -> bool:
    """Whether the name can be written as UTF-8."""
    return _SURROGATE.search(name) is None


def as_text(text: str) -> str:
    """The text with U+FFFD for every byte that is not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def printable(text: str) -> str:
    """The text with all that could drive a terminal written as escapes."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def brief(name: str) -> str:
    """The name as a message bears it: `printable`, and cut where it is longer than names are."""
    return printable(name if len(name) <= 200 else f"{name[:200]}…")


def flag(name: str) -> str:
    """The option by which the command line sets a field of this name."""
    return f"--{name.replace('_', '-')}"


def counted(number: int, word: str) -> str:
    """The number with its word, as many as it takes."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
