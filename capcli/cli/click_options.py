"""Click options built from the fields of the options dataclasses, and commands that print them in sections."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from typing import Any

import click
from click.core import ParameterSource

from capcli.errors import CapcliError, UsageError
from capcli.imports import CORE, hide_broken, importing_package, is_missing
from capcli.options.limits import Limits, limits_of
from capcli.progress import warn

Decorator = Callable[[Any], Any]


class SectionedOption(click.Option):
    """An option that is printed under the heading `section` of the help text."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """Prints its options by section, in the order of their definition."""

    distributed = False  # whether a launcher may start several processes of the command

    def invoke(self, ctx: click.Context) -> Any:
        if not self.distributed:
            refuse_launcher(self.name)
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "section", "Execution"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class KeywordOrNumber(click.ParamType[Any]):
    """A keyword, such as `auto`, or a whole number within the limits of a field. `auto` becomes None."""

    def __init__(self, keyword: str, limits: Limits) -> None:
        self.keyword, self.limits = keyword, limits
        self.name = f"{keyword}|N"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002
        return self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value is None or value == self.keyword:
            return None if value == "auto" else value
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if number is None or not self.limits.allow(number):
            self.fail(f"{value!r} is neither '{self.keyword}' nor a whole number{self.limits.interval}", param, ctx)
        return number


class TokenIds(click.ParamType[Any]):
    """Token ids: `12,5`, or a list in a file."""

    name = "ID,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return tuple(value) if isinstance(value, list) else value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            self.fail(f"{value!r} is not a list of token ids, such as 12,5", param, ctx)
        return tuple(map(int, parts))


def option(
    options: type,
    *flags: str,
    section: str,
    field: str | None = None,
    **settings: Any,
) -> Decorator:
    """A Click option that sets a field of the dataclass `options`.

    The field is the one of the flag's name, or `field`. Its annotation gives the type, the limits and the choices, its
    default value the default. `settings` are arguments of `click.option` and take precedence.
    """
    name = field or flags[-1].split("/")[0].lstrip("-").replace("-", "_")
    default = next(each.default for each in fields(options) if each.name == name)
    if default not in (MISSING, None, ()) and default is not False:
        settings = {"default": default, "show_default": True} | settings
    limits = limits_of(options).get(name)
    if limits is not None and "type" not in settings:
        settings = type_settings(limits, flags) | settings
    return click.option(*flags, cls=SectionedOption, section=section, **settings)


def type_settings(limits: Limits, flags: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `click.option` that follow from the limits of a field."""
    interval = limits.interval
    bounds: Any = (interval.min, interval.max, interval.min_open, interval.max_open)
    if True in limits.choices and len(limits.choices) == 2:
        return {} if "/" in flags[-1] else {"is_flag": True}
    if limits.choices and limits.kind is None:
        return {"type": click.Choice([str(choice).lower() for choice in limits.choices])}
    if limits.choices:
        (keyword,) = limits.choices
        return {"type": KeywordOrNumber(keyword, limits)}
    unlimited = interval.min is None and interval.max is None
    if limits.kind is int:
        return {"metavar": "N", "type": int if unlimited else click.IntRange(*bounds)}
    return {"metavar": "X", "type": float if unlimited else click.FloatRange(*bounds)}


def model_or(default: str | None) -> dict[str, Any]:
    """The arguments of `click.option` for --model, whose default is CAPCLI_MODEL, else `default`."""
    shown = f"CAPCLI_MODEL, else {default}" if default else "CAPCLI_MODEL"
    return {"default": lambda: os.environ.get("CAPCLI_MODEL") or default, "show_default": shown}


def refuse_launcher(command: str | None) -> None:
    """Raises UsageError where a launcher of distributed training, such as torchrun, has started several processes."""
    count = os.environ.get("WORLD_SIZE", "")
    if "LOCAL_RANK" in os.environ and count.isdigit() and int(count) > 1:
        raise UsageError(
            f"capcli {command} is one process, and this launcher (torchrun) started {count}, which would all do the same: "
            f"run capcli {command} without it. For several GPUs start one command for each, with its own "
            "CUDA_VISIBLE_DEVICES, its own part of the images and its own --out"
        )


def auto_or_number(options: type, field: str) -> dict[str, Any]:
    """The arguments of `click.option` for a number that may be None, which the command line calls `auto`."""
    return {"type": KeywordOrNumber("auto", limits_of(options)[field]), "default": "auto", "show_default": True}


def fields_from(options: type, given: dict[str, Any]) -> dict[str, Any]:
    """The entries of a command's parameters that are fields of the dataclass `options`."""
    return {each.name: given[each.name] for each in fields(options) if each.name in given}


def typed_option_in(section: str) -> str | None:
    """The first option of a section that was given on the command line, not in a file or the environment."""
    context = click.get_current_context()
    for param in context.command.params:
        typed = context.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE
        if typed and getattr(param, "section", None) == section:
            return param.opts[0]
    return None


@contextlib.contextmanager
def import_extra(command: str, extra: str) -> Iterator[None]:
    """A context for the import of a command's code: a missing package becomes a CapcliError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "capcli").partition(".")[0]
        if package == "capcli" or package in CORE or not is_missing(error, package):
            raise
        if importing_package(error.__traceback__) is not None:  # an installed package lacks one that it needs
            raise
        raise CapcliError(f"capcli {command} needs {package}: pip install 'capcli[{extra}]'") from error


def do_without_broken(names: Sequence[str]) -> None:
    """Before the import of a command's code: hides broken packages that the command does without, with a warning for each."""
    for line in hide_broken(names):
        warn(line)


def comma_separated(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """A callback: the names in a comma-separated list."""
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def flag_option(*flags: str, section: str, help: str) -> Decorator:  # noqa: A002
    """A flag that sets no field of a dataclass."""
    return click.option(*flags, cls=SectionedOption, section=section, is_flag=True, help=help)


def debug_option(command: Any) -> Any:
    """Adds --debug, which `capcli.cli.main` reads from the context when it prints an error."""

    def store(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
        ctx.ensure_object(dict)[param.name] = value
        return value

    return click.option(
        "--debug",
        cls=SectionedOption,
        section="Execution",
        is_flag=True,
        expose_value=False,
        callback=store,
        help="Print the Python traceback of an error.",
    )(command)


def apply(options: tuple[Decorator, ...], command: Any) -> Any:
    """The command with these options, in this order."""
    for each in reversed(options):
        command = each(command)
    return command
