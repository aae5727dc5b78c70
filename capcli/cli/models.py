"""`capcli models`: which models can caption here, and by which backend."""

from __future__ import annotations

import click

from capcli.cli.click_options import SectionedCommand, debug_option, flag_option


@click.command(cls=SectionedCommand, short_help="List models: what is cached, and which backend runs it.")
@click.argument("folders", nargs=-1, type=click.Path())
@flag_option("--json", "as_json", section="Output", help="Print JSON instead of a table.")
@debug_option
def models(folders: tuple[str, ...], as_json: bool) -> int:
    """List the models in FOLDERS, or without any those in the cache of the Hugging Face Hub, and the architectures that run.

    \b
      capcli models
      capcli models --json | jq -r '.models[] | select(.backend == "slots") | .name'

    A backend is slots (capcli's decode loop, the fastest), generate (transformers' own generate(), for any model from
    image to text that the installed transformers loads), or none. Servers are a backend of their own: capcli caption
    --endpoint. The command downloads nothing.
    """
    from capcli.doctor.backends import run

    return run(folders, as_json=as_json)
