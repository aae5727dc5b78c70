"""Which references a caption's image has, where two files do not call it by the same name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable

# COCO's numbers: alone, padded with zeros, after the name of a split.
_NUMBER = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)", re.IGNORECASE)


def whole(name: str) -> str:
    """The name without what may differ in spelling: `./`, backslashes, and how an accent is put on its letter."""
    return os.path.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def base(name: str) -> str:
    return os.path.basename(whole(name))


def stem(name: str) -> str:
    return os.path.splitext(base(name))[0]


def number(name: str) -> str | None:
    """The image's number in COCO, where the name is one with nothing else in it."""
    found = _NUMBER.fullmatch(stem(name))
    return found[1] if found else None


KEYS: tuple[Callable[[str], str | None], ...] = (whole, base, stem, number)


def match(captioned: Iterable[str], referenced: Iterable[str]) -> dict[str, str]:
    """For each captioned name that can be told, the name that the references know its image by.

    Names that are the same match first, then, of the rest, those that are the same without folders, then without the
    suffix, then by COCO's number. What would fit several names on either side fits none.
    """
    left, right = dict.fromkeys(captioned), dict.fromkeys(referenced)
    matched = {name: name for name in left if name in right}
    left, right = _rest(left, matched), _rest(right, matched.values())
    for key in KEYS:
        if not left or not right:
            break
        ours, theirs = unambiguous(left, key), unambiguous(right, key)
        found = {name: theirs[shared] for shared, name in ours.items() if shared in theirs}
        matched |= found
        left, right = _rest(left, found), _rest(right, found.values())
    return matched


def _rest(names: dict[str, None], taken: Iterable[str]) -> dict[str, None]:
    gone = set(taken)
    return {name: None for name in names if name not in gone}


def unambiguous(names: Iterable[str], key: Callable[[str], str | None]) -> dict[str, str]:
    """Names by their key, without keys that several have."""
    found: dict[str, str] = {}
    several: set[str] = set()
    for name in names:
        shared = key(name)
        if shared is not None and found.setdefault(shared, name) != name:
            several.add(shared)
    return {shared: name for shared, name in found.items() if shared not in several}
