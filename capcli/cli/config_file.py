"""`--config FILE`: a TOML file with options of a command, as defaults for what is set neither on the command line nor in
the environment.

The keys are names of options, grouped in sections. A section with the name of a command, such as `[train]`, is read by
that command only; the names of other sections have no meaning. A value may be a table. An option that no command has is an
error. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

import click

from capcli.cli.click_options import Decorator, SectionedOption
from capcli.errors import UsageError


def config_option(
    name: str = "--config",
    help: str = "Read options from a TOML file. Options on the command line take precedence.",  # noqa: A002
) -> Decorator:
    """Adds the option that names a config file."""
    return click.option(
        name,
        cls=SectionedOption,
        section="Execution",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help=help,
    )


def read_config(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:  # noqa: ARG001
    """A callback, to run before those of other options: the values of the file become defaults of the context."""
    if path is not None:
        params = {str(param.name): param for param in ctx.command.params}
        settings = settings_for(str(ctx.command.name), read_toml(path), path)
        settings |= {name: converted(value, params[name]) for name, value in settings.items()}
        ctx.default_map = {**(ctx.default_map or {}), **settings}
    return path


def converted(value: Any, param: click.Parameter) -> Any:
    """A list for one value of an option that can be repeated, and a text for a boolean that is one of its choices."""
    multiple = getattr(param, "multiple", False)
    if multiple and isinstance(value, str):
        return [value]
    if multiple and not isinstance(value, list):
        raise UsageError(f"{param.name} is {value!r}; it must be a text in quotes, or a list of them")
    if isinstance(param.type, click.Choice) and isinstance(value, bool):
        return str(value).lower()
    return value


def read_toml(path: str) -> dict[str, Any]:
    """The content of a TOML file. Raises UsageError for one that cannot be read."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from error


def settings_for(command: str, sections: dict[str, Any], path: str) -> dict[str, Any]:
    """The options of `command` in the sections of a file, by name.

    Later sections take precedence, and that of the command over all others. Raises UsageError for an unknown option.
    """
    from capcli.cli import cli  # not at the top: the commands, which it imports, import this module

    known = {name: {str(param.name) for param in each.params} for name, each in cli.commands.items()}
    everywhere = set().union(*known.values())
    shared: dict[str, Any] = {}
    specific: dict[str, Any] = {}
    for heading, values in sections.items():
        if isinstance(values, list) and heading in everywhere:  # tables of the same name: [[task]]
            if heading in known[command]:
                shared[heading] = values
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{path}: {heading} is in no section: put it under one, such as [data]")
        allowed = known.get(heading, everywhere)
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"{path}: {key} in [{heading}] is not an option of capcli{hint}")
            if name in known[command]:
                if heading == command:
                    specific[name] = value
                elif heading not in known:
                    shared[name] = value
    return shared | specific
