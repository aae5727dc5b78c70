"""`capcli doctor`: tell what is installed, what works here, and what mends the rest."""

from __future__ import annotations

from functools import partial

import click

from capcli.cli.sections import SectionedCommand, SectionedOption, set_note

output, running = (
    partial(click.option, cls=SectionedOption, section=section, show_envvar=False) for section in ("Output", "Running")
)


@click.command(cls=SectionedCommand, short_help="Tell what is installed, what works here, and how to mend the rest.")
@output("--json", "as_json", is_flag=True, help="JSON on standard output in place of the table.")
@running("--debug", is_flag=True, expose_value=False, callback=set_note, help="Show where an error came from.")
def doctor(as_json: bool) -> int:
    """Tell what is installed, what this machine can do, and the command that mends each thing missing.

    \b
      capcli doctor
      capcli doctor --json | jq '.runtimes[] | {name, state, fix}'

    Versions, processor and GPUs, runtimes, extras, cached captioners, and the engines in ./engines or in the folder that
    CAPCLI_ENGINES names, with whether they fit. A thing is ok, none (not there, and need not be), missing or broken.

    Nothing is changed and nothing is downloaded. The exit code is 0 whatever is found.
    """
    from capcli.doctor.run import run

    return run(as_json=as_json)
