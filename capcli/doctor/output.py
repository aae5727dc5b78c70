"""What `capcli doctor` shows: a table on a terminal, plain lines in a pipe, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from capcli.doctor.findings import Line, Section
from capcli.text import as_text, printable

if TYPE_CHECKING:
    from rich.text import Text

COLOUR = {"ok": "green", "none": "dim", "missing": "yellow", "broken": "red"}


def document(sections: Sequence[Section]) -> str:
    """JSON: a list for each section, of objects with `name`, `state`, `text`, `fix` and what else was found."""
    told = {section.key: [object_of(line) for line in section.lines] for section in sections}
    return json.dumps(told, indent=2, default=str)


def object_of(line: Line) -> dict[str, Any]:
    words = {"name": line.name, "state": line.state, "text": line.text, "fix": line.fix}
    return {key: word and as_text(word) for key, word in words.items()} | dict(line.facts)


def plain(sections: Sequence[Section]) -> None:
    """A line for each thing, and one for what mends it, never broken: for grep, mail and issues."""
    width = min(24, max((len(line.name) for section in sections for line in section.lines), default=0))
    for number, section in enumerate(sections):
        told = [section.title if number == 0 else f"\n{section.title}"]
        for line in section.lines:
            told.append(encodable(f"  {line.state:<7}  {line.name:<{width}}  {line.text}"))
            told += [encodable(f"{'':11}fix: {line.fix}")] if line.fix else []
        print("\n".join(told))


def encodable(text: str) -> str:
    """With escapes for what standard output cannot encode and what could drive a terminal."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def table(sections: Sequence[Section]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold", max_width=26)
    shown.add_column(overflow="fold")
    for section in sections:
        shown.add_row(Text(""), Text(section.title, style="bold"), Text(""))
        for line in section.lines:
            shown.add_row(Text(line.state, style=COLOUR[line.state]), Text(encodable(line.name)), told_of(line))
    Console().print(shown)


def told_of(line: Line) -> Text:
    from rich.text import Text

    text = Text(encodable(line.text))
    if line.fix:
        text.append("\n").append(encodable(line.fix), style="cyan")
    return text
