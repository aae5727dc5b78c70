"""Image names as bytes and as printable text, small pieces of message text, and cells of annotation tables as text.

A name may contain any bytes but NUL. Bytes that are not UTF-8 are lone surrogates, as `os.fsdecode` returns them.
"""

from __future__ import annotations

import json
import re
import unicodedata

_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_NAME = 200  # characters of a name in a message


def raw_bytes(name: str) -> bytes:
    """The bytes of a name. Two names are the same if their bytes are."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a UTF-16 surrogate pair, which names written on Windows may contain
        return name.encode("utf-8", "surrogatepass")


def is_text(name: str) -> bool:
    """Whether the name can be encoded as UTF-8."""
    return _SURROGATE.search(name) is None


def as_text(text: str) -> str:
    """The text with U+FFFD in place of each byte that is not UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def printable(text: str) -> str:
    """The text with escapes in place of characters that could control a terminal."""
    if text.isprintable():
        return text
    return "".join(map(_escaped, text))


def brief(name: str) -> str:
    """The name for a message: `printable`, and shortened if it is longer than 200 characters."""
    return printable(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…")


def flag(name: str) -> str:
    """The command-line option of the field `name`: `--num-beams` of `num_beams`."""
    return f"--{name.replace('_', '-')}"


def counted(number: int, noun: str) -> str:
    """The number and the noun, in the plural where needed: `1 image`, `2,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def clean(text: str) -> str:
    """The text without white space at its ends, on one line, with U+FFFD for bytes that are not UTF-8."""
    text = text.strip()
    return text if text.isprintable() else as_text(_BREAKS.sub(" ", text))


def json_list(cell: str) -> list[object] | None:
    """The JSON list of strings or objects in a table cell; None for any other cell."""
    if cell.startswith(('["', "[{")) and cell.endswith("]"):
        try:
            found: list[object] = json.loads(cell)
        except (ValueError, RecursionError):
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


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
