"""The command line: one file per command, Click only; nothing heavy is imported before a command runs."""

from __future__ import annotations

import gc
import os
import sys
import traceback

import click

from capcli import __version__
from capcli.cli.bench import bench
from capcli.cli.caption import caption
from capcli.cli.doctor import doctor
from capcli.cli.evaluate import evaluate
from capcli.cli.export import export
from capcli.cli.prepare import prepare
from capcli.cli.train import train
from capcli.errors import CapcliError

HELP = "Caption folders of images in bulk."
# How often garbage is looked for: torch and transformers make 600,000 objects that stay, which Python would go through again
# and again while it loads them.
SELDOM = (10_000, 20, 20)


@click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="capcli")
def cli() -> None:
    pass


cli.add_command(bench)
cli.add_command(caption)
cli.add_command(doctor)
cli.add_command(evaluate)
cli.add_command(export)
cli.add_command(prepare)
cli.add_command(train)


def main() -> None:
    """The program: runs a command and exits with its code; every error is one line that says what to do."""
    gc.set_threshold(*SELDOM)
    replace_closed_streams()
    stdout = sys.stdout
    asked: dict[str, bool] = {}  # where a command leaves word of --debug
    try:
        code = cli.main(auto_envvar_prefix="CAPCLI", prog_name="capcli", standalone_mode=False, obj=asked) or 0
        sys.stdout.flush()  # here a closed pipe is nothing; at the interpreter's end it would be an error
        sys.exit(code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except CapcliError as error:
        if asked.get("debug"):
            traceback.print_exc()
        click.echo(f"capcli: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokenPipeError, SystemExit) as error:
        # Click takes a closed pipe for a fault: it puts another stream in place of stdout and exits with 1.
        if isinstance(error, SystemExit) and sys.stdout is stdout:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if asked.get("debug"):
            raise
        click.echo(f"capcli: unexpected {type(error).__name__}: {error} (--debug shows where)", err=True)
        sys.exit(1)
    finally:
        gc.freeze()  # the interpreter would go through all of torch once more before it ends: half a second


def replace_closed_streams() -> None:
    """Takes the place of streams that a caller closed (`2>&-`): files opened later would, and messages would go into them."""
    while (taken := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(taken)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)  # open for reading only: rows written there are an error
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
