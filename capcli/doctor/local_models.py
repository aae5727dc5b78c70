"""Captioners in the hub's cache, and engines on this disk."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from capcli.doctor.machine import Gpu
from capcli.doctor.output import Line, error_text, megabytes
from capcli.engine.check import added_files, damages, misfits
from capcli.engine.engine_json import ENGINES, Engine, engines_folder, read_engine
from capcli.engine.packages import RUNTIME
from capcli.errors import CapcliError
from capcli.models.model_files import ENGINE, is_engine
from capcli.options import DEFAULT_MODEL
from capcli.text import as_text


def model_lines() -> Iterator[Line]:
    """One line for each cached captioner, and one for all other models together."""
    from huggingface_hub import constants

    repos = cached_repos()
    lines = [line for repo in repos if (line := captioner_line(repo))]
    yield from lines
    if not lines:
        offline = "; HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
        text = f"no captioner in {constants.HF_HUB_CACHE}; the first run downloads its model{offline}"
        yield Line(DEFAULT_MODEL, "none", text, f"hf download {DEFAULT_MODEL}")
    if count := len(repos) - len(lines):
        size = sum(repo.size_on_disk for repo in repos) - sum(line.facts["bytes"] for line in lines)
        yield Line("others", "none", f"{count} that {'is' if count == 1 else 'are'} unsupported, {megabytes(size)}")


def cached_repos() -> list[Any]:
    """The models in the hub's cache by name, as huggingface_hub lists them."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []
    return sorted(repos, key=lambda repo: str(repo.repo_id))


def newest_revision(repo: Any) -> Any:
    """The revision of a cached model that a run would take; None where the cache has none."""
    revisions = sorted(repo.revisions, key=lambda each: ("main" in each.refs, each.last_modified))
    return revisions[-1] if revisions else None


def cached_models() -> Iterator[tuple[Any, Any]]:
    """Each cached model with its newest revision."""
    for repo in cached_repos():
        if (revision := newest_revision(repo)) is not None:
            yield repo, revision


def captioner_line(repo: Any) -> Line | None:
    """A cached model's newest revision; None if it is not a supported captioner."""
    from capcli.models.model_files import CONFIG, IncompleteError, check_architecture, collect_files, list_model

    if (newest := newest_revision(repo)) is None:
        return None
    name, size = str(repo.repo_id), megabytes(repo.size_on_disk)
    facts = {"bytes": int(repo.size_on_disk), "revision": newest.commit_hash}
    try:
        files = list_model(str(newest.snapshot_path), "The cached copy")
        if CONFIG not in files.names:
            return None
        check_architecture(name, files.read_json(CONFIG))
    except CapcliError:
        return None
    try:
        collect_files(name, files, newest.commit_hash)
    except IncompleteError as error:
        return Line(name, "missing", f"{size}; {error}", f"hf download {name}", facts)
    except Exception as error:
        return Line(name, "broken", f"{size}; {error}", f"hf download --force-download {name}", facts)
    return Line(name, "ok", f"{size}, commit {newest.commit_hash[:8]}", facts=facts)


def engine_lines(versions: Mapping[str, str], gpus: Sequence[Gpu]) -> Iterator[Line]:
    """One line for each folder with an engine.json; `versions` are those of the runtimes, by package."""
    root = engines_folder()
    try:
        names = sorted(os.listdir(root))
    except FileNotFoundError:
        yield Line(root, "none", f"no such folder; ${ENGINES} selects another")
        return
    except OSError as error:
        yield Line(root, "broken", f"{error.strerror or error}; ${ENGINES} selects another folder")
        return
    folders = [folder for name in names if is_engine(folder := os.path.join(root, name))]
    for folder in folders:
        try:
            yield engine_line(folder, versions, gpus)
        except Exception as error:  # engine.json may have any content
            reason = str(error) if isinstance(error, CapcliError) else f"{ENGINE} is damaged: {error_text(error)}"
            old, aside = shlex.quote(folder), shlex.quote(f"{folder}-damaged")
            fix = f"mv {old} {aside} && capcli export --onnx --model MODEL --out {old}"
            yield Line(folder, "broken", reason, fix, {"path": as_text(folder)})
    if not folders:
        yield Line(root, "none", "no engine; capcli export builds one", "capcli export --onnx")


def engine_line(folder: str, versions: Mapping[str, str], gpus: Sequence[Gpu]) -> Line:
    """Raises CapcliError, or any error of a wrong value, where engine.json cannot be read."""
    engine = read_engine(folder)
    package = RUNTIME[engine.kind]
    problems = [*damages(folder, engine), *unfit(engine, versions, gpus)]
    with os.scandir(folder) as entries:
        size = sum(entry.stat().st_size for entry in entries if entry.is_file())
    name = str(engine.captioner.get("name", "unknown"))
    facts = {
        "path": as_text(folder),
        "kind": engine.kind,
        "profile": engine.profile,
        "precision": engine.precision,
        "captioner": as_text(name),
        "bytes": size,
        "fits": not problems,
        "misfits": problems,
        "proved": engine.passed,
    }
    failed = [] if engine.passed else [str(engine.parity.get("failed"))]
    if failed and not engine.unfinished:
        failed = [f"it failed its parity check ({failed[0]}) and was kept by --force"]
    text = f"{package.title}, {engine.profile}, {engine.precision}, {megabytes(size)}, of {name}: "
    text += "; ".join([*problems, *failed]) or "fits"
    if not problems and engine.passed:
        return Line(folder, "ok", text, facts=facts)
    fix: str | None = engine.finish if engine.unfinished else engine.rebuild
    if foreign := added_files(folder, engine):  # capcli export replaces no folder with files that are not its own
        fix = shlex.join(
            ["mv", "-n", *(os.path.join(folder, file) for file in foreign), os.path.dirname(folder) or "."]
        )
    if package.name not in versions:
        fix = package.install
    if engine.kind == "tensorrt" and not gpus:
        fix = None  # plans are built on the machine with the GPU
    return Line(folder, "broken", text, fix, facts)


def unfit(engine: Engine, versions: Mapping[str, str], gpus: Sequence[Gpu]) -> list[str]:
    """What prevents the engine from running here, on the GPU that fits best."""
    package = RUNTIME[engine.kind]
    if package.name not in versions:
        return [f"{package.title} is missing"]
    identities: list[dict[str, str] | None] = [gpu.identity for gpu in gpus] or [None]
    problems = min((misfits(engine, versions, identity) for identity in identities), key=len)
    if engine.kind == "onnx" and engine.dtype == "bfloat16" and not gpus:
        problems = [*problems, "ONNX Runtime computes in bfloat16 on CUDA only"]
    return problems
