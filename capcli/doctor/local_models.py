"""What lies on this disk: captioners in the hub's cache, and engines."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from capcli.doctor.findings import Line, megabytes, said
from capcli.doctor.machine import Gpu
from capcli.engine.check import added_files, damages, misfits
from capcli.engine.engine_json import ENGINES, Engine, engines_folder, read_engine
from capcli.engine.packages import RUNTIME
from capcli.errors import CapcliError
from capcli.models.model_files import ENGINE, is_engine
from capcli.options import DEFAULT_MODEL
from capcli.options.export_command import in_folder
from capcli.text import as_text


@dataclass(frozen=True, slots=True)
class Here:
    """What of this machine decides whether an engine fits: the runtimes' versions, and the GPUs."""

    versions: Mapping[str, str] = field(default_factory=dict)
    gpus: Sequence[Gpu] = ()


def look_at_models() -> Iterator[Line]:
    """A line for each captioner in the cache; other models are one line together."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_type == "model"]
    except CacheNotFound:
        repos = []
    lines = [line for repo in sorted(repos, key=lambda repo: str(repo.repo_id)) if (line := captioner_line(repo))]
    yield from lines
    if not lines:
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        text = f"no captioner in {constants.HF_HUB_CACHE}; the first run downloads its own{offline}"
        yield Line(DEFAULT_MODEL, "none", text, f"hf download {DEFAULT_MODEL}")
    if len(repos) > len(lines):
        others = sum(repo.size_on_disk for repo in repos) - sum(line.facts["bytes"] for line in lines)
        count = len(repos) - len(lines)
        yield Line("others", "none", f"{count} that {'is' if count == 1 else 'are'} no captioner, {megabytes(others)}")


def captioner_line(repo: Any) -> Line | None:
    """A cached captioner; None for another model."""
    from capcli.models.model_files import CONFIG, IncompleteError, check_architecture, collect_files, list_model

    name, size = str(repo.repo_id), int(repo.size_on_disk)
    revisions = sorted(repo.revisions, key=lambda each: ("main" in each.refs, each.last_modified))
    if not revisions:
        return None
    newest = revisions[-1]
    facts = {"bytes": size, "revision": newest.commit_hash}
    try:
        shelf = list_model(str(newest.snapshot_path), "The cached copy")
        if CONFIG not in shelf.names:
            return None
        check_architecture(name, shelf.read_json(CONFIG))
    except CapcliError:
        return None
    except Exception as error:
        return Line(name, "broken", f"{megabytes(size)}; cannot be read: {said(error)}", f"hf download {name}", facts)
    try:
        collect_files(name, shelf, newest.commit_hash)
    except IncompleteError as lack:
        return Line(name, "missing", f"{megabytes(size)}; {lack}", f"hf download {name}", facts)
    except Exception as error:
        again = f"hf download --force-download {name}"
        return Line(name, "broken", f"{megabytes(size)}; {error}", again, facts)
    return Line(name, "ok", f"{megabytes(size)}, commit {newest.commit_hash[:8]}", facts=facts)


def look_at_engines(here: Here) -> Iterator[Line]:
    """A line for each folder with an engine.json."""
    root = engines_folder()
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        why = "no such folder" if absent else error.strerror or str(error)
        yield Line(root, "none" if absent else "broken", f"{why}; engines are looked for here, or in ${ENGINES}")
        return
    folders = [folder for name in names if is_engine(folder := os.path.join(root, name))]
    for folder in folders:
        try:
            yield engine_line(folder, here)
        except Exception as error:  # engine.json may hold anything at all
            why = str(error) if isinstance(error, CapcliError) else f"{ENGINE} is damaged: {said(error)}"
            yield Line(folder, "broken", why, rebuild_damaged(folder), {"path": as_text(folder)})
    if not folders:
        yield Line(root, "none", "no engine; capcli export builds one", "capcli export --onnx")


def engine_line(folder: str, here: Here) -> Line:
    engine = read_engine(folder)
    lines = [*damages(folder, engine), *unfit(engine, here)]
    package = RUNTIME[engine.kind]
    what = f"{package.title}, {engine.profile}, {engine.precision}, {megabytes(size_of(folder))}"
    of = str(engine.captioner.get("name", "unknown"))
    facts = {
        "path": as_text(folder),
        "kind": engine.kind,
        "profile": engine.profile,
        "precision": engine.precision,
        "captioner": as_text(of),
        "bytes": size_of(folder),
        "fits": not lines,
        "misfits": lines,
        "proved": engine.passed,
    }
    text = f"{what}, of {of}: " + ("; ".join([*lines, *unproved(engine)]) or "fits")
    if not lines and engine.passed:
        return Line(folder, "ok", text, facts=facts)
    again = engine.finish if engine.unfinished else engine.rebuild
    if others := added_files(folder, engine):  # an export would refuse to replace a folder with files of somebody's
        again = shlex.join(
            ["mv", "-n", *(os.path.join(folder, name) for name in others), os.path.dirname(folder) or os.curdir]
        )
    fix: str | None = again if package.name in here.versions else package.install
    if engine.kind == "tensorrt" and not here.gpus:
        fix = None  # plans are built where a GPU is
    return Line(folder, "broken", text, fix, facts)


def unproved(engine: Engine) -> list[str]:
    """Why it has not passed its proof."""
    failed = str(engine.parity.get("failed"))
    if engine.passed:
        return []
    return [failed if engine.unfinished else f"it failed its proof ({failed}) and was kept by --force"]


def unfit(engine: Engine, here: Here) -> list[str]:
    """What keeps the engine from running here, by the GPU that suits it best."""
    package = RUNTIME[engine.kind]
    if package.name not in here.versions:
        return [f"{package.title} is missing"]
    gpus: list[dict[str, str] | None] = [gpu.fits() for gpu in here.gpus] or [None]
    lines = min((misfits(engine, here.versions, gpu) for gpu in gpus), key=len)
    if engine.kind == "onnx" and engine.dtype == "bfloat16" and not here.gpus:
        lines = [*lines, "ONNX Runtime computes in bfloat16 on CUDA only"]
    return lines


def rebuild_damaged(folder: str) -> str:
    """The command for an engine whose engine.json cannot be trusted, by what it still tells of how it was built."""
    place, aside = shlex.quote(folder), shlex.quote(f"{folder}-damaged")
    try:
        again = shlex.join(told_command(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        again = f"capcli export --onnx --model MODEL --out {place}"
    return f"mv {place} {aside} && {again}"


def told_command(folder: str) -> Sequence[str]:
    """The export that engine.json tells of. Raises ValueError, OSError, KeyError or TypeError where it tells of none."""
    with open(os.path.join(folder, ENGINE), encoding="utf-8") as file:
        command: list[str] = json.load(file)["command"]
    if command[:2] != ["capcli", "export"]:
        raise ValueError("no export")
    return in_folder(command, folder)


def size_of(folder: str) -> int:
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if entry.is_file())
