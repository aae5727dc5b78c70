"""Text without torch: names of images that may not be UTF-8, option names, and the cells of caption tables."""

from __future__ import annotations

import json
import re
import unicodedata

_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
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


def clean(text: str) -> str:
    """The text without white space at its ends, on one line, with U+FFFD for bytes that are not UTF-8."""
    text = text.strip()
    return text if text.isprintable() else as_text(_BREAKS.sub(" ", text))


def json_list(cell: str) -> list[object] | None:
    """The JSON list of strings or objects that a table cell holds; None for any other cell."""
    if cell.startswith(('["', "[{")) and cell.endswith("]"):
        try:
            found: list[object] = json.loads(cell)
        except ValueError:
            return None
        return found
    return None


def tag_text(value: object) -> str:
    """Tags as one text, `[dog] [bark]`: from that text itself, a list or a list in JSON; empty for an empty cell."""
    if hasattr(value, "tolist"):  # NumPy's array
        value = value.tolist()
    if isinstance(value, str):
        listed = json_list(value)
        value = value if listed is None else listed
    if isinstance(value, list | tuple):
        tags = (clean(str(tag)) for tag in value if tag is not None)
        return " ".join(f"[{tag}]" for tag in tags if tag)
    return "" if value is None or value != value else clean(str(value))  # only NaN differs from itself


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
