"""The folder of an engine: what an export may replace, the temporary folder it builds in, and the final rename."""

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


def target_folder(options: ExportOptions) -> str:
    """The absolute path of the engine's folder. Raises UsageError where it contains what an export must not replace."""
    model = os.path.realpath(os.path.expanduser(options.model))
    finished_in = model if options.kind == "tensorrt" and is_unfinished(model) else None
    name = os.path.basename(os.path.abspath(os.path.expanduser(options.model)))
    if options.out is None and not name:
        raise UsageError(f"--model {options.model} gives no name for the engine: give --out")
    shown = options.out or finished_in or os.path.join(engines_folder(), name)
    out = os.path.realpath(os.path.expanduser(shown))
    for option, path in (("--model", options.model), ("--out", out)):
        if not is_utf8(path):
            raise UsageError(f"{option} {path!r} is not UTF-8, and no runtime opens such a path: rename it")
    if os.path.exists(out) and not os.path.isdir(out):
        raise UsageError(f"--out {shown} is a file; name a folder")
    if within(os.getcwd(), out):
        raise UsageError(f"--out {shown} is or contains the working directory: name another folder")
    inputs = [("--verify-with", options.verify_with)] + [("--model", options.model)] * (out != finished_in)
    for option, given in inputs:
        if given is not None and within(os.path.realpath(os.path.expanduser(given)), out) and os.path.exists(out):
            raise UsageError(f"--out {shown} contains the input of {option}: name another folder")
    if os.path.isdir(out) and os.listdir(out):
        if not is_engine(out):
            raise UsageError(f"--out {shown} is not empty and is not an engine: name another folder")
        if not options.overwrite and out != finished_in:
            raise UsageError(f"--out {shown} is already an engine: --overwrite replaces it")
        refuse_foreign_files(out)
    return out


def is_unfinished(folder: str) -> bool:
    """Whether the folder is an engine whose plans are not built yet."""
    return is_engine(folder) and read_engine(folder).unfinished


def is_utf8(path: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in path)


def within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


def refuse_foreign_files(out: str) -> None:
    """Raises UsageError where an engine's folder has files that no export wrote: replacing it would delete them."""
    foreign = sorted(set(os.listdir(out)) - {ENGINE, GENERATION, *read_engine(out).files})
    if foreign:
        raise UsageError(
            f"--out {out} contains {foreign[0]}, which is not part of its engine: move it, or name another"
        )


@contextmanager
def build_folder(out: str) -> Iterator[str]:
    """A new folder beside `out`, removed at the end, also after SIGTERM, unless it was renamed.

    Folders that killed exports left are removed first. Raises CapcliError where nothing can be written.
    """
    parent, name = os.path.split(out)
    prefix = f".{name}.building-"
    with terminable(), ExitStack() as leaving:
        with writing(out):
            os.makedirs(parent, exist_ok=True)
            remove_abandoned(os.path.join(parent, prefix))
            site = tempfile.mkdtemp(prefix=prefix, dir=parent)
            leaving.callback(shutil.rmtree, site, ignore_errors=True)
            locks.take(open_folder(site, leaving))
            folder = os.path.join(site, name)
            os.mkdir(folder)
        yield folder


def remove_abandoned(prefix: str) -> None:
    """Removes the temporary folders of this prefix whose lock is free: their export was killed."""
    for site in glob.glob(f"{glob.escape(prefix)}????????"):
        with suppress(OSError), ExitStack() as leaving:
            if locks.is_free(open_folder(site, leaving)):
                shutil.rmtree(site, ignore_errors=True)


def open_folder(path: str, leaving: ExitStack) -> int:
    """A descriptor of a folder, not of a link to one, that is closed with `leaving`. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    leaving.callback(os.close, descriptor)
    return descriptor


@contextmanager
def writing(out: str) -> Iterator[None]:
    """A context for code that writes an engine: OSError becomes CapcliError."""
    try:
        yield
    except OSError as error:
        raise CapcliError(f"--out {out} cannot be written: {error.strerror or error}") from error


def copy(source: str, target: str) -> None:
    """Raises CapcliError where the file cannot be copied."""
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise CapcliError(f"{source} cannot be copied to {target}: {error.strerror}") from error


def put_in_place(building: str, out: str, *, overwrite: bool) -> None:
    """Renames the new folder to `out`; an older engine there is restored when that fails or a signal interrupts it.

    Raises CapcliError where it cannot be renamed.
    """
    with writing(out):
        if not (overwrite and os.path.isdir(out) and os.listdir(out)):
            os.rename(building, out)  # fails where something else was created there meanwhile
            return
        refuse_foreign_files(out)
        aside = f"{building}.old"  # in the temporary folder, which is removed at the end
        try:
            os.rename(out, aside)
            os.rename(building, out)
        except BaseException:
            if not os.path.exists(out):
                os.rename(aside, out)
            raise
