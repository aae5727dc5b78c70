"""`capcli doctor`: checks the installation and the machine."""

from __future__ import annotations

import click

from capcli.cli.click_options import SectionedCommand, debug_option, flag_option


@click.command(cls=SectionedCommand, short_help="Check the installation and the machine, with a fix per problem.")
@flag_option("--json", "as_json", section="Output", help="Print JSON instead of a table.")
@debug_option
def doctor(as_json: bool) -> int:
    """Check what is installed and what works on this machine, and print the command that fixes each problem.

    \b
      capcli doctor
      capcli doctor --json | jq '.runtimes[] | {name, state, fix}'

    The report lists versions, processor and GPUs, runtimes, optional packages, cached captioners, and the engines in
    ./engines or in the folder that CAPCLI_ENGINES names, with whether they can run here. A state is ok, none (not
    installed and not required), missing or broken.

    The command changes nothing and downloads nothing. Its exit code is always 0.
    """
    from capcli.doctor.run import run

    return run(as_json=as_json)
