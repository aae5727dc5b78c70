"""The limits of option values, each written once: in the annotation of a field of an options dataclass.

`check_limits` checks a dataclass against them, and the command line builds its Click types from `limits_of`. A field may be
annotated with one of the aliases below, with `Annotated[int, Range(2, 8)]`, or with a `Literal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from capcli.errors import UsageError
from capcli.text import flag


@dataclass(frozen=True, slots=True)
class Range:
    """An interval of numbers. None means no limit; an open end is excluded."""

    min: float | None = None
    max: float | None = None
    min_open: bool = False
    max_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.min is None or number > self.min or (number == self.min and not self.min_open)
        below = self.max is None or number < self.max or (number == self.max and not self.max_open)
        return above and below

    def __str__(self) -> str:
        """The interval as text, to be appended to "number": " of at least 1 and below 5"."""
        low = "" if self.min is None else f"{'above' if self.min_open else 'of at least'} {self.min}"
        high = "" if self.max is None else f"{'below' if self.max_open else 'at most'} {self.max}"
        ends = [end for end in (low, high) if end]
        return f" {' and '.join(ends)}" if ends else ""


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, min_open=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1, max_open=True)]
OpenFraction = Annotated[float, Range(0, 1, min_open=True, max_open=True)]


@dataclass(frozen=True, slots=True)
class Limits:
    """The allowed values of a field: a finite number in `interval` (whole where `kind` is int), one of `choices`, or None."""

    kind: type[int | float] | None = None
    interval: Range = Range()
    choices: tuple[Any, ...] = ()
    optional: bool = False

    def allow(self, value: Any) -> bool:
        if value is None:
            return self.optional
        return any(value == choice for choice in self.choices) or self._is_number(value)

    def _is_number(self, value: Any) -> bool:
        if self.kind is None or isinstance(value, bool):
            return False
        kinds = int if self.kind is int else (int, float)
        return isinstance(value, kinds) and math.isfinite(value) and value in self.interval

    def __str__(self) -> str:
        """The limits as text, to be appended to "it must be"."""
        number = f"a {'whole ' if self.kind is int else ''}number{self.interval}"
        parts = [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in self.choices]
        parts += [number] if self.kind is not None else []
        return " or ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


@cache
def limits_of(options: type) -> Mapping[str, Limits]:
    """The limits of the fields of a dataclass, by name. Fields that accept any text or object have none."""
    hints = get_type_hints(options, include_extras=True)
    found = {field.name: read_limits(hints[field.name]) for field in fields(options)}
    return {name: limits for name, limits in found.items() if limits is not None}


def read_limits(hint: Any) -> Limits | None:
    """The limits that a type hint states; None where it also allows other types than numbers, literals and None."""
    kind: type[int | float] | None = None
    interval, optional = Range(), False
    choices: list[Any] = []
    for part in alternatives(hint):
        if get_origin(part) is Literal:
            choices += get_args(part)
        elif part is type(None):
            optional = True
        elif part is bool:
            choices += [True, False]
        elif part in (int, float):
            kind = part
        elif get_origin(part) is Annotated:
            kind, interval = get_args(part)[:2]
        else:
            return None
    return Limits(kind, interval, tuple(choices), optional)


def alternatives(hint: Any) -> Iterator[Any]:
    """The members of a union and of the unions in it, or the type itself."""
    if get_origin(hint) in (Union, UnionType):
        for part in get_args(hint):
            yield from alternatives(part)
    else:
        yield hint


def check_limits(options: Any, written: Callable[[str], str] = flag) -> None:
    """Raises UsageError for the first field out of its limits; `written` turns a field's name into the name to show."""
    for name, limits in limits_of(options.__class__).items():
        value = getattr(options, name)
        if not limits.allow(value):
            raise UsageError(f"{written(name)} is {value!r}; it must be {limits}")
