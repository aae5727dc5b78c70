"""Flickr token files: a caption a line, after its image's name and the caption's number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial

from capcli.annotations.rows import Annotations, Row
from capcli.annotations.text_files import lines
from capcli.errors import CapcliError
from capcli.sources import IMAGE_SUFFIXES
from capcli.text import printable

_SUFFIX = "(?i:" + "|".join(map(re.escape, IMAGE_SUFFIXES)) + ")"
_MARK = r"(?:#[A-Za-z]+)?#\d+"  # #0, or #zhc#0: the language, then the caption's number
# Names may hold blanks and '#': what is before a tab is one whole; before a blank it ends with an image's suffix.
_LINES = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        rf"([^\t]+{_SUFFIX}){_MARK}\t(.*)",
        rf"(.+?{_SUFFIX}){_MARK}(?:[ \t]+(.*))?",
        rf"([^\t]+?){_MARK}\t(.*)",
        rf"(\S+?){_MARK}(?:[ \t]+(.*))?",
    )
)


def token_file(path: str, first: str) -> Annotations | None:
    """The token file that begins with the line `first`; None where it is none."""
    if _match(first) is None:
        return None
    return Annotations(path, "Flickr token file", partial(_rows, path), os.path.dirname(path))


def _match(line: str) -> re.Match[str] | None:
    return next(filter(None, (pattern.fullmatch(line) for pattern in _LINES)), None)


def _rows(path: str) -> Iterator[Row]:
    with lines(path) as stream:
        for number, line in enumerate(stream, 1):
            found = _match(line.rstrip("\r\n"))
            if found:
                yield Row(found[1], (found[2],))
            elif line.strip():
                wrong = f"line {number} is not like the others, 'name.jpg#0<tab>caption': {line.strip()[:60]!r}"
                yield Row.unread(CapcliError(f"{printable(path)}: {wrong}"))
