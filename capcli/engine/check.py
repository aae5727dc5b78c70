"""Whether an engine folder is unchanged since its parity check, and whether it fits this machine. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from capcli.engine.engine_json import ENCODE, STEP, Engine, plan_files
from capcli.engine.packages import RUNTIME, release
from capcli.errors import CapcliError
from capcli.models.model_files import ENGINE, GENERATION, file_hash, list_model, setting_files


def damages(folder: str, engine: Engine) -> Iterator[str]:
    """The differences between the folder and engine.json, a line each. Users may change the generation settings."""
    present = list_model(folder).names
    if GENERATION not in present:
        yield f"it lacks {GENERATION}"
    package = RUNTIME[engine.kind]
    if package.name not in engine.versions and not engine.unfinished:
        yield f"{ENGINE} names no version of {package.title}"
    for name in sorted({*runtime_files(engine)} - {*engine.files}):
        yield f"{ENGINE} does not name {name}"
    yield from (f"{name} was added to it (remove it)" for name in added_files(folder, engine))
    for name, digest in engine.files.items():
        if name not in present:
            yield f"it lacks {name}"
        elif file_hash(os.path.join(folder, name)) != digest:
            yield f"{name} has changed since the engine was built (its hash differs from the one in {ENGINE})"


def added_files(folder: str, engine: Engine) -> list[str]:
    """Files in the folder that loading would read and that are not part of the engine."""
    present = setting_files(list_model(folder).names)
    return [name for name in present if name not in engine.files and name != GENERATION]


def runtime_files(engine: Engine) -> list[str]:
    """The files of the folder that the engine's runtime opens."""
    if engine.unfinished:
        return []
    return [ENCODE, STEP] if engine.kind == "onnx" else plan_files(engine.buckets)


def refuse_tampered(folder: str, engine: Engine) -> None:
    """Raises CapcliError, with the command that rebuilds it, for an engine that has changed since it was built."""
    line = next(damages(folder, engine), None)
    if line is not None:
        again = "" if added_files(folder, engine) else f". Build it again: {engine.rebuild}"
        raise CapcliError(f"the engine {folder} was modified after it was built: {line}{again}")


def misfits(engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> list[str]:
    """Differences between this machine and the one of the parity check, a line each: the runtime's version and the GPU."""
    package = RUNTIME[engine.kind]
    built, installed = engine.versions.get(package.name), versions.get(package.name)
    lines = []
    if built and installed and release(built, package.binding) != release(installed, package.binding):
        lines.append(f"it was built with {package.name} {built}, and {installed} is installed")
    if engine.gpu is not None and gpu != engine.gpu:
        lines.append(
            f"it was built on a {engine.gpu.get('name')}, and the GPU here is {gpu['name'] if gpu else 'none'}"
        )
    return lines


def refuse_misfit(folder: str, engine: Engine, versions: Mapping[str, str], gpu: Mapping[str, str] | None) -> None:
    """Raises CapcliError, with the command that rebuilds it, for an engine that does not fit this machine."""
    lines = misfits(engine, versions, gpu)
    if lines:
        raise CapcliError(
            f"the engine {folder} does not fit this machine: {'; '.join(lines)}. Build it again: {engine.rebuild}"
        )
