"""What the doctor finds: lines under headings, each with the command that mends what it tells of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "none", "missing", "broken"]


@dataclass(frozen=True, slots=True)
class Line:
    """One thing that was looked at.

    `none` is not there and need not be; `missing` would be of use; `broken` is there and does not work. `fix` is a command.
    `facts` are the same for programs.
    """

    name: str
    state: State
    text: str
    fix: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, the word that programs know it by, and its lines."""

    key: str
    title: str
    lines: tuple[Line, ...]


def section(key: str, title: str, look: Callable[[], Iterable[Line]]) -> Section:
    """What `look` finds. Whatever breaks it is a line: a doctor whom a wound kills is of no use."""
    lines: list[Line] = []
    try:
        lines.extend(look())
    except Exception as error:
        lines.append(Line(title, "broken", f"cannot be told: {said(error)}"))
    return Section(key, title, tuple(lines))


def said(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def gibibytes(count: float) -> str:
    return f"{count / (1 << 30):.1f} GiB"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
