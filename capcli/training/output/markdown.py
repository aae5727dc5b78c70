"""Escapes arbitrary text for Markdown, so that it is displayed literally."""

from __future__ import annotations

import re
from collections.abc import Sequence

from capcli.text import as_text, printable


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Its cells are Markdown."""
    # A pipe ends a cell even in a code span unless it is escaped.
    lines = [header, ["---"] * len(header), *([re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    """The text as a Markdown code span."""
    text = as_text(printable(text)) or " "
    fence = "`" * (longest_backticks(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def prose(text: str) -> str:
    """The text with every character escaped that is special in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]<>#~|&!$])", r"\\\1", as_text(printable(text)))


def fenced(language: str, lines: Sequence[str]) -> str:
    """The lines as a fenced code block."""
    text = "\n".join(lines)
    fence = "`" * max(3, longest_backticks(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def longest_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
