"""Matches the image names of captions with those of references, where the two files name images differently."""

from __future__ import annotations

import re
from collections.abc import Iterable

from capcli.annotations.name_matching import Key, base, composed, stem, unambiguous

# COCO's numbers: alone, padded with zeros, or after the name of a split.
_NUMBER = re.compile(r"(?:COCO_[a-z]+\d{4}_)?0*(\d+)", re.IGNORECASE)


def number(name: str) -> str | None:
    """The image's number in COCO, if the name consists of one."""
    found = _NUMBER.fullmatch(stem(name))
    return found[1] if found else None


KEYS: tuple[Key, ...] = (composed, base, stem, number)


def match(captioned: Iterable[str], referenced: Iterable[str]) -> dict[str, str]:
    """For each captioned name with a match, the name of the same image in the references.

    Equal names match first, then those equal when normalized, without folders, without the suffix, and by COCO's number. A
    key shared by several names on either side matches none of them.
    """
    left, right = dict.fromkeys(captioned), dict.fromkeys(referenced)
    matched = {name: name for name in left if name in right}
    left, right = _rest(left, matched), _rest(right, matched.values())
    for key in KEYS:
        if not left or not right:
            break
        left_keys, right_keys = unambiguous(left, key), unambiguous(right, key)
        found = {name: right_keys[shared] for shared, name in left_keys.items() if shared in right_keys}
        matched |= found
        left, right = _rest(left, found), _rest(right, found.values())
    return matched


def _rest(names: dict[str, None], taken: Iterable[str]) -> dict[str, None]:
    removed = set(taken)
    return {name: None for name in names if name not in removed}
