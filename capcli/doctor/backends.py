"""What `capcli models` prints: cached models and model folders with the backend that runs each, and all architectures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from capcli.doctor import output
from capcli.doctor.local_models import cached_models
from capcli.doctor.output import Line, Section, megabytes, section
from capcli.errors import CapcliError
from capcli.models.model_files import (
    CONFIG,
    CONVERTED,
    ENGINE,
    JOINED,
    VLMS,
    WHOLE,
    has_family,
    is_vlm,
    list_model,
    model_type,
)

SLOTS, GENERATE, NONE = "slots", "generate", "none"


def run(folders: Sequence[str], *, as_json: bool) -> int:
    """Print the models and the architectures on standard output. The exit code is always 0."""
    found = folder_models(folders) if folders else cache_models()
    sections = [section("models", "Models" if folders else "Cached models", lambda: found)]
    if not folders:
        sections += [Section("architectures", "Architectures", tuple(architecture_lines()))]
    output.show(sections, as_json=as_json)
    return 0


def cache_models() -> Iterator[Line]:
    """One line for each model in the hub's cache that may caption."""
    count = 0
    for repo, revision in cached_models():
        line = model_line(str(repo.repo_id), str(revision.snapshot_path), int(repo.size_on_disk))
        if line.facts["backend"] != NONE:
            count += 1
            yield line
    if not count:
        from huggingface_hub import constants

        yield Line("none", "none", f"no captioner in {constants.HF_HUB_CACHE}", facts={"backend": NONE})


def folder_models(folders: Iterable[str]) -> Iterator[Line]:
    """One line for each folder."""
    for folder in folders:
        if not os.path.isdir(folder):
            yield Line(folder, "none", "no such folder", facts={"backend": NONE})
            continue
        with os.scandir(folder) as entries:
            size = sum(entry.stat().st_size for entry in entries if entry.is_file())
        yield model_line(folder, folder, size)


def model_line(name: str, folder: str, size: int) -> Line:
    """The architecture of a model, the backend that runs it, and its size."""
    try:
        listing = list_model(folder)
        if CONFIG not in listing.names:
            raise CapcliError(f"it has no {CONFIG}")
        config = listing.read_json(CONFIG)
    except CapcliError as error:
        return Line(name, "none", str(error), facts={"backend": NONE, "bytes": size})
    kind = str(config.get("model_type"))
    backend = backend_of(config)
    parts = [part for names, _, _ in (JOINED.get(kind, ((), (), ())),) for part in names]
    inner = [str(model_type(config.get(part))) for part in parts]
    title = f"{kind} ({' + '.join(inner)})" if inner else kind
    facts = {"backend": backend, "architecture": title, "bytes": size, "engine": ENGINE in listing.names}
    text = f"{title}, {megabytes(size)}: {'an engine' if facts['engine'] else backend}"
    return Line(name, "none" if backend == NONE else "ok", text, facts=facts)


def backend_of(config: dict[str, object]) -> str:
    """The backend that `--backend auto` takes for a config.json."""
    if has_family(config) or is_vlm(config):
        return SLOTS
    from capcli.models.auto import generates

    if config.get("model_type") in CONVERTED and "auto_map" in config:
        return NONE
    return GENERATE if generates(config) else NONE


def architecture_lines() -> Iterator[Line]:
    """One line for each backend, with the model types that it runs."""
    from capcli.models.auto import IMAGE_TO_TEXT

    joined = [
        f"{kind} ({', '.join(encoders)} + {', '.join(decoders)})" for kind, (_, encoders, decoders) in JOINED.items()
    ]
    slots = [*WHOLE, *VLMS, *joined]
    yield Line(SLOTS, "ok", "; ".join(slots), facts={"architectures": slots})
    others = sorted(set(IMAGE_TO_TEXT) - set(WHOLE) - set(VLMS) - set(JOINED))
    yield Line(GENERATE, "ok", f"{len(others)}: {', '.join(others)}", facts={"architectures": others})
