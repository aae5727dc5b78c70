"""What `capcli doctor` prints: a table on a terminal, plain lines in a pipe, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from capcli.text import as_text, printable

State = Literal["ok", "none", "missing", "broken"]
COLOUR: Mapping[State, str] = {"ok": "green", "none": "dim", "missing": "yellow", "broken": "red"}


@dataclass(frozen=True, slots=True)
class Line:
    """One finding.

    `none`: not present and not needed. `missing`: not present and useful. `broken`: present and does not work. `fix` is a
    shell command, `facts` are further keys of the JSON.
    """

    name: str
    state: State
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """Lines under a title; `key` is their name in the JSON."""

    key: str
    title: str
    lines: tuple[Line, ...]


def section(key: str, title: str, find: Callable[[], Iterable[Line]]) -> Section:
    """The lines of `find`. An exception becomes a line, so that one broken part does not hide the others."""
    lines: list[Line] = []
    try:
        lines.extend(find())
    except Exception as error:
        lines.append(Line(title, "broken", f"cannot be examined: {error_text(error)}"))
    return Section(key, title, tuple(lines))


def error_text(error: BaseException) -> str:
    """The type and message of an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"


def show(sections: Sequence[Section], *, as_json: bool) -> None:
    """Print the sections on standard output."""
    if as_json:
        print(
            json.dumps({section.key: list(map(_object, section.lines)) for section in sections}, indent=2, default=str)
        )
    elif sys.stdout.isatty():
        _print_table(sections)
    else:
        _print_lines(sections)


def _object(line: Line) -> dict[str, Any]:
    texts = {"name": line.name, "state": line.state, "text": line.text, "fix": line.fix}
    return {key: text and as_text(text) for key, text in texts.items()} | dict(line.facts)


def _print_lines(sections: Sequence[Section]) -> None:
    """One unbroken line for each finding and one for its fix: for grep and bug reports."""
    width = min(24, max((len(line.name) for section in sections for line in section.lines), default=0))
    for number, section in enumerate(sections):
        print(("\n" if number else "") + section.title)
        for line in section.lines:
            print(_encodable(f"  {line.state:<7}  {line.name:<{width}}  {line.text}"))
            if line.fix:
                print(_encodable(f"{'':11}fix: {line.fix}"))


def _print_table(sections: Sequence[Section]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=26)
    table.add_column(overflow="fold")
    for section in sections:
        table.add_row(Text(""), Text(section.title, style="bold"), Text(""))
        for line in section.lines:
            text = Text(_encodable(line.text))
            if line.fix:
                text.append("\n").append(_encodable(line.fix), style="cyan")
            table.add_row(Text(line.state, style=COLOUR[line.state]), Text(_encodable(line.name)), text)
    Console().print(table)


def _encodable(text: str) -> str:
    """With escapes for control characters and for what standard output cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)
