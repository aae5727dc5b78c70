"""Patterns over names with `/` in them: `*.jpg`, `2024/*`, `raw/**/*.tif`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from capcli.sources.hidden import HIDDEN_PATTERN, is_hidden

MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True, slots=True)
class Pattern:
    """One pattern over relative names.

    `*`, `?` and `[abc]` (`[!abc]`) match within one part of the name; `**` as a whole part matches any number of folders,
    and at the end everything below. Case matters. Unless `hidden`, wildcards match no hidden name, as in a shell:
    `.cache/*.jpg` finds what `*/*.jpg` does not.
    """

    parts: tuple[re.Pattern[str] | None, ...]  # None: `**`
    hidden: bool

    @classmethod
    def anchored(cls, text: str, *, hidden: bool = False) -> Pattern:
        """A pattern over the whole relative name."""
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if parts and parts[-1] == "**":
            parts.append("*")
        return cls(tuple(None if part == "**" else _part(part, hidden=hidden) for part in parts), hidden)

    @classmethod
    def loose(cls, text: str, *, hidden: bool = False) -> Pattern:
        """A pattern over base names at any depth, or, if it has a `/`, over the whole relative name."""
        stripped = text.rstrip("/")
        return cls.anchored(stripped if "/" in stripped else f"**/{stripped}", hidden=hidden)

    def matches(self, name: str) -> bool:
        return len(self.parts) in self._reached(name)

    def may_match_below(self, folder: str) -> bool:
        """Whether something below this folder could match."""
        return any(position < len(self.parts) for position in self._reached(folder))

    def _reached(self, name: str) -> set[int]:
        """The positions in the pattern that can be reached after all parts of the name."""
        positions = self._skip_folders({0})
        for part in name.split("/"):
            after = set()
            for position in positions:
                if position == len(self.parts):
                    continue
                step = self.parts[position]
                if step is None:
                    if self.hidden or not is_hidden(part):
                        after.add(position)
                elif step.match(part):
                    after.add(position + 1)
            positions = self._skip_folders(after)
        return positions

    def _skip_folders(self, positions: set[int]) -> set[int]:
        """With the positions behind each `**` that is reached: it also matches no folder."""
        reached = set(positions)
        for position, step in enumerate(self.parts):
            if step is None and position in reached:
                reached.add(position + 1)
        return reached


def _part(text: str, *, hidden: bool) -> re.Pattern[str]:
    guard = f"(?!{HIDDEN_PATTERN})" if not hidden and MAGIC.match(text) else ""
    return re.compile(guard + fnmatch.translate(text))


@dataclass(frozen=True, slots=True)
class PatternFilter:
    """Which names below a folder are wanted."""

    include: tuple[Pattern, ...]
    exclude: tuple[Pattern, ...]
    suffixes: tuple[str, ...]

    @classmethod
    def of(cls, include: Iterable[str], exclude: Iterable[str], suffixes: tuple[str, ...]) -> PatternFilter:
        return cls(
            tuple(Pattern.loose(text) for text in include),
            tuple(Pattern.loose(text, hidden=True) for text in exclude),
            suffixes,
        )

    def takes(self, name: str) -> bool:
        """Whether a file is wanted: by its suffix where there is no include pattern."""
        if self.excludes(name):
            return False
        if self.include:
            return any(pattern.matches(name) for pattern in self.include)
        return name.lower().endswith(self.suffixes)

    def excludes(self, name: str) -> bool:
        """Whether an exclude pattern matches the name of a file or folder."""
        return any(pattern.matches(name) for pattern in self.exclude)

    def enters(self, folder: str) -> bool:
        """Whether a folder is walked; a hidden one only where an include pattern names it."""
        if self.excludes(folder):
            return False
        return not is_hidden(folder) or any(pattern.may_match_below(folder) for pattern in self.include)
