"""Matches names that two files spell differently: the one place that decides when two names are those of one image."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable

Key = Callable[[str], str | None]


def composed(name: str) -> str:
    """The name in Unicode's composed form (macOS lists decomposed ones), with slashes for backslashes and without `./`."""
    return os.path.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def base(name: str) -> str:
    return os.path.basename(composed(name))


def stem(name: str) -> str:
    return os.path.splitext(base(name))[0]


def unambiguous(names: Iterable[str], key: Key) -> dict[str, str]:
    """Names by their key, without keys that several names share."""
    found: dict[str, str] = {}
    several: set[str] = set()
    for name in names:
        shared = key(name)
        if shared is not None and found.setdefault(shared, name) != name:
            several.add(shared)
    return {shared: name for shared, name in found.items() if shared not in several}


class NameIndex:
    """Names, to be found by an equal one or else by the first of `keys` that only one of them shares with it."""

    def __init__(self, names: Iterable[str], keys: Iterable[Key] = (composed,)) -> None:
        self._names = dict.fromkeys(names)
        self._keys = tuple(keys)
        self._by_key: dict[Key, dict[str, str]] = {}  # filled when a name is first not found as it is

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def find(self, name: str) -> str | None:
        """The name in the index that means the same image, or None."""
        if name in self._names:
            return name
        for key in self._keys:
            if key not in self._by_key:
                self._by_key[key] = unambiguous(self._names, key)
            wanted = key(name)
            found = None if wanted is None else self._by_key[key].get(wanted)
            if found is not None:
                return found
        return None
