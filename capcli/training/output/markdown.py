"""Any text at all in Markdown and in YAML, where it stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from capcli.text import as_text, printable

PLAIN = re.compile(r"[A-Za-z][\w./-]*", re.ASCII)
YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; its cells are Markdown already."""
    # A pipe ends a cell even inside code, unless a backslash stands before it.
    lines = [header, ["---"] * len(header), *([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """The text as it is, as a Markdown code span."""
    text = as_text(printable(text)) or " "
    fence = "`" * (longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def prose(text: str) -> str:
    """The text with all that Markdown or HTML would act on escaped."""
    return re.sub(r"([\\`*_\[\]<>#~|&!$])", r"\\\1", as_text(printable(text)))


def fenced(language: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def yaml_string(text: str) -> str:
    if PLAIN.fullmatch(text) and text.lower() not in YAML_WORDS:
        return text
    return json.dumps(as_text(printable(text)), ensure_ascii=False)
