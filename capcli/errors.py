"""What a user can mend: every error capcli raises on purpose, with the exit code it ends a run with."""

from __future__ import annotations


class CapcliError(Exception):
    """The run could not be done. The message says what happened, to which file, and what to do."""

    exit_code = 1


class UsageError(CapcliError):
    """The command was wrong: nothing was started."""

    exit_code = 2


class ImageError(Exception):
    """One image could not be captioned: the run goes on and the image becomes a failure.

    `kind` is one word for programs (`missing`, `unreadable`, `too-large`, `timeout`, ...), the message one line for people.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
