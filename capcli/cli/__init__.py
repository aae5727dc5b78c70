"""The command line: one module per command. Modules that are slow to import are imported when a command runs."""

from __future__ import annotations

import atexit
import gc
import io
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
from capcli.cli.models import models
from capcli.cli.prepare import prepare
from capcli.cli.train import train
from capcli.errors import CapcliError
from capcli.imports import explain_import
from capcli.text import printable_lines

# Garbage collection thresholds. torch and transformers create 600,000 objects that live until the end; with Python's own
# thresholds they would be traversed again and again while the packages are imported.
GC_THRESHOLDS = (10_000, 20, 20)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="capcli")
def cli() -> None:
    """Caption folders of images in bulk, and train, export and evaluate captioners.

    \b
      capcli caption ./photos --out captions.jsonl
      capcli COMMAND --help

    Each option can also be set by an environment variable: CAPCLI_CAPTION_NUM_BEAMS=4 is --num-beams 4 of caption.
    """


for command in (bench, caption, doctor, evaluate, export, models, prepare, train):
    cli.add_command(command)


def main() -> None:
    """The program: runs a command and exits with its code. An error is one line on standard error, unless --debug is given.

    While the command runs, garbage is collected less often. At exit the interpreter does not traverse the remaining objects
    again, which takes half a second for those of torch.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(*GC_THRESHOLDS)
    atexit.register(gc.freeze)
    replace_closed_streams()
    stdout = sys.stdout
    flags: dict[str, bool] = {}  # the context object, in which a command stores --debug
    try:
        code = cli.main(auto_envvar_prefix="CAPCLI", prog_name="capcli", standalone_mode=False, obj=flags) or 0
        sys.stdout.flush()  # a closed pipe raises here; at the end of the interpreter it would print an error
        sys.exit(code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        message = io.StringIO()
        error.show(message)
        click.echo(printable_lines(message.getvalue()), err=True, nl=False)
        sys.exit(error.exit_code)
    except CapcliError as error:
        if flags.get("debug"):
            traceback.print_exc()
        show_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (BrokenPipeError, SystemExit) as error:
        # Click treats a closed pipe as an error: it replaces sys.stdout and exits with 1.
        if isinstance(error, SystemExit) and sys.stdout is stdout:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if flags.get("debug"):
            raise
        unexplained = f"unexpected {type(error).__name__}: {error} (--debug prints the traceback)"
        show_error(explain_import(error) or unexplained)
        sys.exit(1)
    finally:
        gc.set_threshold(*thresholds)


def show_error(message: str) -> None:
    """Prints an error on standard error. What it quotes from files cannot control the terminal."""
    click.echo(printable_lines(f"capcli: {message}"), err=True)


def replace_closed_streams() -> None:
    """Opens standard streams that the caller closed (`2>&-`). Files opened later would get their numbers, and messages would
    be written into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)  # open for reading only: writing rows to it is an error
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
