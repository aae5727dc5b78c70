"""The program `capcli`, also run by `python -m capcli`: runs the command line, or says which package it lacks."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs `capcli.cli.main`. Where the command line itself cannot be imported, exits with 1 and the reason."""
    try:
        from capcli.cli import main as run
    except Exception as error:
        from capcli.imports import explain_import

        line = explain_import(error)
        if line is None:
            raise
        sys.exit(f"capcli: {line}")
    run()


if __name__ == "__main__":
    main()
