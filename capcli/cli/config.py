"""`--config FILE`: a command's options from a TOML file, whose values stand where no flag and no variable is given.

Sections are for the reader, but two kinds: `[prepare]`, `[train]` and the like are read by the command of that name
alone, and a table among a section's values is one value. A key is an option's name; a name that no command knows is an
error, so that nothing is left out in silence. Paths are relative to the folder in which the command runs.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from typing import Any

import click

from capcli.cli.sections import SectionedOption
from capcli.errors import UsageError


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:  # noqa: ARG001
    """A callback, to run before the others: the file's values become the context's defaults."""
    if path is not None:
        options = {str(param.name): param for param in ctx.command.params}
        settings = chosen(read(path), str(ctx.command.name), path)
        settings |= {name: as_typed(value, options[name]) for name, value in settings.items()}
        ctx.default_map = {**(ctx.default_map or {}), **settings}
    return path


def as_typed(value: Any, param: click.Parameter) -> Any:
    """One value where several may stand, and a boolean where a flag has words for it."""
    if getattr(param, "multiple", False) and isinstance(value, str):
        return [value]
    if getattr(param, "multiple", False) and not isinstance(value, list):
        raise UsageError(f"{param.name} is {value!r}; it must be a text in quotes, or a list of them")
    if isinstance(param.type, click.Choice) and isinstance(value, bool):
        return str(value).lower()
    return value


def config_option(
    name: str = "--config",
    help: str = "Take options from a TOML file; flags win.",  # noqa: A002
) -> Callable[[Any], Any]:
    return click.option(
        name,
        cls=SectionedOption,
        section="Running",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help=help,
    )


def read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from error


def chosen(sections: dict[str, Any], command: str, path: str) -> dict[str, Any]:
    """What of a file's sections is for `command`: later values win, those in a section of its own above all."""
    from capcli.cli import cli

    known = {name: {str(param.name) for param in each.params} for name, each in cli.commands.items()}
    everywhere = set().union(*known.values())
    shared: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for heading, values in sections.items():
        if isinstance(values, list) and heading in everywhere:  # tables of one name: [[task]]
            if heading in known[command]:
                shared[heading] = values
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {heading} stands in no section; put it under one, such as [data]")
        allowed = known.get(heading, everywhere)
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"{path}: [{heading}] has {key}, which is no option of capcli{hint}")
            if name in known[command]:
                if heading == command:
                    own[name] = value
                elif heading not in known:
                    shared[name] = value
    return shared | own
