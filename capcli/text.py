"""Image names as bytes and as printable text, small pieces of message text, and cells of annotation tables as text.

A name may contain any bytes but NUL. Bytes that are not UTF-8 are lone surrogates, as `os.fsdecode` returns them.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
import warnings

_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_NAME = 200  # characters of a name in a message
MISSING_TEXTS = frozenset(
    {"nan", "NaN", "None", "<NA>", "NaT", "null", "NULL"}
)  # a missing value, as programs print it
_OPENING = ("[", "(", "{", "array(")
# One token of a list as Python, pandas and NumPy print it; NumPy prints no commas.
_PRINTED = re.compile(
    r"""\s*(?:
        (?P<text>u?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))
        |(?P<open>[\[({]|(?:array|list|tuple|set|frozenset|(?:np|numpy)\.\w+)[(])
        |(?P<close>[\])}])
        |(?P<missing>(?:nan|NaN|None|<NA>|NaT|null)(?![\w.]))
        |(?P<number>[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?(?![\w.]))
        |(?P<comma>,)
        |dtype=(?:[\w.]+|'[^']*')
    )\s*""",
    re.DOTALL | re.VERBOSE,
)


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


def printable_lines(text: str) -> str:
    """`printable` for a message that may have several lines."""
    return "\n".join(map(printable, text.split("\n")))


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


def listed(cell: str) -> list[object] | None:
    """The list in a table cell, in JSON or as Python, pandas and NumPy print it; None for any other cell.

    `["a"]`, `['a', "b's"]`, `['a' 'b']`, `[nan, None]` and `[]` are lists; `[12]` and `[a dog]` are text. Missing values
    are None or NaN.
    """
    if not cell.startswith(_OPENING) or not cell.endswith(("]", ")", "}")):
        return None
    if cell.startswith("["):
        found = _evaluated(cell)
        if isinstance(found, list) and (not found or any(isinstance(item, str | list | dict | None) for item in found)):
            return found
    return _printed_list(cell)


def _evaluated(cell: str) -> object:
    """The value of JSON or, for a list of objects, of Python; None where it is neither."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        pass
    return _literal(cell) if cell.startswith("[{") else None


def _literal(text: str) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an escape sequence that Python does not know
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None


def _printed_list(cell: str) -> list[object] | None:
    """The items of a printed list and of the lists in it, in one list; None where the cell has anything else."""
    items: list[object] = []
    depth = position = commas = 0
    while position < len(cell):
        token = _PRINTED.match(cell, position)
        if token is None or (position and not depth):
            return None
        position, kind, text = token.end(), token.lastgroup, token[0].strip()
        depth += (kind == "open") - (kind == "close")
        commas += kind == "comma"
        if kind in ("text", "number"):
            items.append(_literal(text) if "\\" in text or kind == "number" else text.removeprefix("u")[1:-1])
        elif kind == "missing":
            items.append(None)
    a_list = cell.startswith("[") and (not items or any(item is None or isinstance(item, str) for item in items))
    a_group = any(isinstance(item, str) for item in items) and (commas > 0 or not cell.startswith("("))
    return items if depth == 0 and (a_list or a_group) else None


def tag_text(value: object) -> str:
    """Tags as one text, `[dog] [bark]`: from that text itself, a list or a printed list; empty for an empty cell."""
    if hasattr(value, "tolist"):  # NumPy's array
        value = value.tolist()
    if isinstance(value, str):
        found = listed(value.strip())
        value = value if found is None else found
    if isinstance(value, list | tuple):
        tags = (clean(str(tag)) for tag in value if tag is not None)
        return " ".join(f"[{tag}]" for tag in tags if tag and tag not in MISSING_TEXTS)
    text = "" if value is None or value != value else clean(str(value))  # only NaN differs from itself
    return "" if text in MISSING_TEXTS else text


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
