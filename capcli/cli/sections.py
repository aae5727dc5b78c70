"""Help in sections: a command whose options stand under the heading that each names."""

from __future__ import annotations

from typing import Any

import click


class SectionedOption(click.Option):
    """An option under a heading of the help text."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """Prints its options by section, in the order of their definition."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "section", "Running"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class AutoOrNumber(click.ParamType[int | None]):
    """`auto` (None) or a whole number of at least `least`."""

    name = "auto|N"

    def __init__(self, least: int) -> None:
        self.least = least

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        return "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        if value is None or value == "auto" or isinstance(value, int):
            return None if value == "auto" else value
        try:
            number = int(value)
        except ValueError:
            self.fail(f"{value!r} is neither 'auto' nor a whole number", param, ctx)
        if number < self.least:
            self.fail(f"{number} is less than {self.least}", param, ctx)
        return number


def comma_separated(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A callback: names separated by commas."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def set_note(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """A callback: tells the program, which shows errors, what a flag says."""
    ctx.ensure_object(dict)[param.name] = value
    return value
