"""The exceptions that capcli raises, each with the exit code of the command."""

from __future__ import annotations


class CapcliError(Exception):
    """The command failed. The message states what happened, to which file, and what to do."""

    exit_code = 1


class UsageError(CapcliError):
    """The command's arguments are wrong; nothing was started."""

    exit_code = 2


class UnfinishedError(CapcliError):
    """The run stopped before its last image; what was captioned is kept, and the same command continues the run."""


class BoundError(UnfinishedError):
    """The run reached a bound on its cost."""

    exit_code = 4


class ImageError(Exception):
    """One image cannot be captioned. The run continues, and the image becomes a failure.

    `kind` is a machine-readable error code (`missing`, `unreadable`, `too-large`, `timeout`, ...), the message one line of
    text.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
