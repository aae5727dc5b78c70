"""The files of a run, as they follow from what is asked: captions, receipt, failures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from capcli.errors import CapcliError, UsageError
from capcli.options import Format, SinkOptions
from capcli.storage import run_file
from capcli.text import printable


def format_of(options: SinkOptions) -> Format:
    """The format of the captions file; UsageError where neither option nor suffix says it."""
    if options.format is not None:
        return options.format
    suffix = os.path.splitext(options.out or "")[1].lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".csv":
        return "csv"
    raise UsageError(f"--out {printable(options.out or '')}: name it .jsonl or .csv, or say --format")


def refuse_without_files(options: SinkOptions) -> None:
    """Raises UsageError for what is about the files of an earlier run, where there are none.

    Without captions a list of failures can be started anew, and tells a run that writes sidecars alone what failed.
    """
    if options.out not in (None, "-"):
        return
    if options.overwrite and options.failures is None:
        raise UsageError("--overwrite starts a file anew: name it with --out")
    if options.retry_failed and (options.failures is None or options.out == "-" or options.sidecar is None):
        raise UsageError("--retry-failed tries again what failed on the way to a file: name that file with --out")


@dataclass(frozen=True)
class Paths:
    """The files of a run: captions, their receipt, failures; None where there is no such file."""

    out: str | None
    receipt: str | None
    failures: str | None

    @classmethod
    def of(cls, options: SinkOptions) -> Self:
        if options.sidecar_dir is not None and options.sidecar is None:
            raise UsageError("--sidecar-dir says where sidecars go: ask for them with --sidecar")
        refuse_without_files(options)
        if options.out in (None, "-"):
            return cls(None, None, options.failures)
        stem = os.path.splitext(options.out)[0]
        paths = cls(options.out, f"{stem}.run.json", options.failures or f"{stem}.failures.jsonl")
        if len({os.path.realpath(path) for path in (paths.out, paths.receipt, paths.failures) if path}) < 3:
            raise UsageError("--out, --failures and the receipt are one file: give each a name of its own")
        return paths

    def read_receipt(self, *, overwrite: bool, rows: bool) -> dict[str, Any] | None:
        """What an earlier run left.

        Raises UsageError for rows without receipt, and for a receipt that belongs to another captions file of the same
        stem; CapcliError where it cannot be read.
        """
        if self.out is None or self.receipt is None:
            return None
        try:
            left = run_file.read(self.receipt)
        except CapcliError:
            if not overwrite:
                raise
            left = None
        own = os.path.basename(self.out)
        other = str((left or {}).get("output", own))
        if other != own and os.path.exists(os.path.join(os.path.dirname(self.out), other)):
            raise UsageError(
                f"the receipt {printable(self.receipt)} belongs to {printable(other)}: choose another --out"
            )
        if rows and left is None:
            raise UsageError(
                f"{printable(self.out)} holds rows, but no receipt {printable(self.receipt)} says how they were made: "
                "choose another --out; --overwrite starts anew"
            )
        return left

    def write_receipt(self, data: Mapping[str, Any]) -> None:
        """Replace the receipt, where there is one."""
        if self.out is not None and self.receipt is not None:
            run_file.write(self.receipt, {**data, "output": os.path.basename(self.out)})
