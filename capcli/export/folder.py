"""Where an engine goes: what it may replace, the folder in which it is built, and how it takes its place."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from capcli.engine.engine_json import engines_folder, read_engine
from capcli.errors import CapcliError, UsageError
from capcli.interrupts import terminable
from capcli.models.model_files import ENGINE, GENERATION, is_engine
from capcli.options import ExportOptions
from capcli.storage import locks

LOCK = "lock"


def target_folder(options: ExportOptions) -> str:
    """The engine's folder. Raises UsageError where something lies that an export must not replace."""
    model = os.path.realpath(os.path.expanduser(options.model))
    finished_in = model if options.kind == "tensorrt" and is_unfinished(model) else None
    name = os.path.basename(os.path.abspath(os.path.expanduser(options.model)))
    if options.out is None and not name:
        raise UsageError(f"--model {options.model} has no name that an engine could take: give --out")
    asked = options.out or finished_in or os.path.join(engines_folder(), name)
    out = os.path.realpath(os.path.expanduser(asked))
    for option, path in (("--model", options.model), ("--out", out)):
        if not is_utf8(path):
            raise UsageError(f"{option} {path!r} is not UTF-8, and no runtime opens such a path: give it another name")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {asked} is a file; name a folder")
    if within(os.getcwd(), out):
        raise UsageError(f"--out {asked} is the folder in which this runs, or holds it: name another")
    read = [("--verify-with", options.verify_with)] + [("--model", options.model)] * (out != finished_in)
    for option, given in read:
        if given is not None and within(os.path.realpath(os.path.expanduser(given)), out) and os.path.exists(out):
            raise UsageError(f"--out {asked} holds what {option} reads: name another folder")
    if os.path.isdir(out) and os.listdir(out):
        if not is_engine(out):
            raise UsageError(f"--out {asked} is not empty and holds no engine: name another folder")
        if not options.overwrite and out != finished_in:
            raise UsageError(f"--out {asked} holds an engine: --overwrite replaces it")
        refuse_strangers(out)
    return out


def is_unfinished(folder: str) -> bool:
    """Whether it is an engine whose graphs wait for TensorRT."""
    return is_engine(folder) and read_engine(folder).unfinished


def is_utf8(path: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def refuse_strangers(out: str) -> None:
    """Raises UsageError where a folder holds more than its engine: only what an export wrote may go."""
    strange = sorted(set(os.listdir(out)) - {ENGINE, GENERATION, *read_engine(out).files})
    if strange:
        raise UsageError(f"--out {out} holds {strange[0]} besides an engine: move it, or name another folder")


@contextmanager
def build_folder(out: str) -> Iterator[str]:
    """A new folder beside `out`, which goes unless it took its place; SIGTERM unwinds. What a killed export left goes first.

    Raises CapcliError where nothing can be written.
    """
    parent, name = os.path.split(out)
    prefix = f".{name}.building-"
    with terminable(), ExitStack() as leaving:
        with written(out):
            os.makedirs(parent, exist_ok=True)
            sweep(os.path.join(parent, prefix))
            site = tempfile.mkdtemp(prefix=prefix, dir=parent)
            leaving.callback(shutil.rmtree, site, ignore_errors=True)
            locks.take(leaving.enter_context(open(os.path.join(site, LOCK), "wb")).fileno())
            folder = os.path.join(site, name)
            os.mkdir(folder)
        yield folder


def sweep(prefix: str) -> None:
    """Removes the sites of this prefix whose export was killed: nobody holds their lock."""
    for site in glob.glob(f"{glob.escape(prefix)}????????"):
        with suppress(OSError), open(os.path.join(site, LOCK), "ab") as lock:
            if locks.take(lock.fileno()):
                shutil.rmtree(site, ignore_errors=True)


@contextmanager
def written(out: str) -> Iterator[None]:
    """What is done in it writes an engine: OSError becomes CapcliError."""
    try:
        yield
    except OSError as error:
        raise CapcliError(f"--out {out} cannot be written: {error.strerror or error}") from error


def copy(source: str, target: str) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise CapcliError(f"{source} cannot be copied to {target}: {error.strerror}") from error


def put_in_place(building: str, out: str, *, overwrite: bool) -> None:
    """The new folder takes the place of an older engine, which comes back where that fails or a signal ends it.

    Raises CapcliError where it cannot be done.
    """
    with written(out):
        if not (overwrite and os.path.isdir(out) and os.listdir(out)):
            os.rename(building, out)  # which fails where anything came there meanwhile
            return
        refuse_strangers(out)
        aside = f"{building}.old"  # goes with the site
        try:
            os.rename(out, aside)
            os.rename(building, out)
        except BaseException:
            if not os.path.exists(out):
                os.rename(aside, out)
            raise
