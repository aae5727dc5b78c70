"""Whether an engine folder is as it was built and proved, and whether it fits this machine. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from capcli.engine.engine_json import ENCODE, STEP, Engine, plan_files
from capcli.engine.packages import RUNTIME, release
from capcli.errors import CapcliError
from capcli.models.model_files import ENGINE, GENERATION, file_hash, list_model, setting_files


def damages(folder: str, engine: Engine) -> Iterator[str]:
    """What of the folder is not as it was built and proved, a line each; the generation settings are a user's to change."""
    there = list_model(folder).names
    if GENERATION not in there:
        yield f"it lacks {GENERATION}"
    package = RUNTIME[engine.kind]
    if package.name not in engine.versions and not engine.unfinished:
        yield f"{ENGINE} names no version of {package.title}"
    for name in sorted({*run_files(engine)} - {*engine.files}):
        yield f"{ENGINE} does not name {name}"
    yield from (f"{name} was put into it (take it out)" for name in strangers(folder, engine))
    for name, digest in engine.files.items():
        if name not in there:
            yield f"it lacks {name}"
        elif file_hash(os.path.join(folder, name)) != digest:
            yield f"{name} is not the file that was built and proved (its hash differs from {ENGINE}'s)"


def strangers(folder: str, engine: Engine) -> list[str]:
    """Files that would be read, and that the engine was not built with."""
    there = setting_files(list_model(folder).names)
    return [name for name in there if name not in engine.files and name != GENERATION]


def run_files(engine: Engine) -> list[str]:
    """What a runtime opens of it."""
    if engine.unfinished:
        return []
    return [ENCODE, STEP] if engine.kind == "onnx" else plan_files(engine.buckets)


def refuse_tampered(folder: str, engine: Engine) -> None:
    """Raises CapcliError, naming the command that rebuilds it, for an engine that is not as it was built."""
    line = next(damages(folder, engine), None)
    if line is not None:
        again = "" if strangers(folder, engine) else f". Build it again: {engine.rebuild}"
        raise CapcliError(f"the engine {folder} is not as it was built: {line}{again}")


def misfits(engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> list[str]:
    """What of this machine is not as when the engine was built, a line each; only its runtime's version and the GPU count."""
    package = RUNTIME[engine.kind]
    built, here = (told.get(package.name) for told in (engine.versions, versions))
    lines = []
    if built and here and release(built, package.binding) != release(here, package.binding):
        lines.append(f"it was built with {package.name} {built}, and here is {here}")
    if engine.gpu is not None and gpu != engine.gpu:
        lines.append(
            f"it was built on a {engine.gpu.get('name')}, and the GPU here is {gpu['name'] if gpu else 'none'}"
        )
    return lines


def refuse_misfit(folder: str, engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> None:
    """Raises CapcliError, naming the command that rebuilds it, for an engine of another machine."""
    lines = misfits(engine, versions, gpu)
    if lines:
        raise CapcliError(
            f"the engine {folder} does not fit this machine: {'; '.join(lines)}. Build it again: {engine.rebuild}"
        )
