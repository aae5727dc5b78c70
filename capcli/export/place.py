"""Where an engine goes: what it may replace, the folder in which it is built, and how it takes its place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from capcli.engine import ENGINE, is_engine, read_engine
from capcli.errors import CapcliError, UsageError
from capcli.models.files import SETTINGS, TOKENIZER
from capcli.options import ExportOptions

ENGINES = "CAPCLI_ENGINES"


def place(options: ExportOptions) -> str:
    """The engine's folder. Raises UsageError where something lies that an export must not replace."""
    name = os.path.basename(os.path.abspath(os.path.expanduser(options.model)))
    if options.out is None and not name:
        raise UsageError(f"--model {options.model} has no name that an engine could take: give --out")
    asked = options.out or os.path.join(os.environ.get(ENGINES) or "engines", name)
    out = os.path.realpath(os.path.expanduser(asked))
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {asked} is a file; name a folder")
    if within(os.getcwd(), out):
        raise UsageError(f"--out {asked} is the folder in which this runs, or holds it: name another")
    for option, path in (("--model", options.model), ("--verify-with", options.verify_with)):
        if path is not None and within(os.path.realpath(os.path.expanduser(path)), out) and os.path.exists(out):
            raise UsageError(f"--out {asked} holds what {option} reads: name another folder")
    if os.path.isdir(out) and os.listdir(out):
        if not is_engine(out):
            raise UsageError(f"--out {asked} is not empty and holds no engine: name another folder")
        if not options.overwrite:
            raise UsageError(f"--out {asked} holds an engine: --overwrite replaces it")
        refuse_strangers(out)
    return out


def within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def refuse_strangers(out: str) -> None:
    """Raises UsageError where a folder holds more than its engine: only what an export wrote may go."""
    ours = {ENGINE, *SETTINGS, *TOKENIZER, *read_engine(out).files}
    strange = sorted(name for name in os.listdir(out) if name not in ours and not name.endswith(".model"))
    if strange:
        raise UsageError(f"--out {out} holds {strange[0]} besides an engine: move it, or name another folder")


@contextmanager
def building_site(out: str) -> Iterator[str]:
    """A new folder beside `out`, which goes unless it took its place. Raises CapcliError where nothing can be written."""
    parent, name = os.path.split(out)
    try:
        os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent) as site:
            folder = os.path.join(site, name)
            os.mkdir(folder)
            yield folder
    except OSError as error:
        raise CapcliError(f"--out {out} cannot be written: {error.strerror or error}") from error


def put_in_place(building: str, out: str, *, overwrite: bool) -> None:
    """The new folder takes the place of an older engine, which is there until the new one is. Raises OSError."""
    if not (overwrite and os.path.isdir(out) and os.listdir(out)):
        os.rename(building, out)  # which fails where anything came there meanwhile
        return
    refuse_strangers(out)
    aside = f"{building}.old"
    os.rename(out, aside)
    try:
        os.rename(building, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)
