"""The README shows the help texts as they are. `python tests/test_readme.py` writes them into it."""

from __future__ import annotations

import re
from pathlib import Path

import click

from capcli.cli import cli

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"<!-- help (\w+) -->\n(.*?)<!-- /help -->", re.DOTALL)


def help_text(name: str) -> str:
    names = ["-h", "--help"]  # as the group hands them down
    command = cli.commands[name]
    with click.Context(command, info_name=f"capcli {name}", terminal_width=100, help_option_names=names) as context:
        return f"```\n{context.get_help()}\n```\n"


def test_the_readme_shows_the_help_as_it_is() -> None:
    shown = dict(BLOCK.findall(README.read_text()))
    assert shown == {name: help_text(name) for name in cli.commands}, "run: python tests/test_readme.py"


def test_every_command_is_in_the_readme() -> None:
    text = README.read_text()
    assert all(f"`capcli {name}`" in text for name in cli.commands)


if __name__ == "__main__":
    README.write_text(
        BLOCK.sub(lambda block: f"<!-- help {block[1]} -->\n{help_text(block[1])}<!-- /help -->", README.read_text())
    )
