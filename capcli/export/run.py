"""`capcli export` on one page: captioner -> graphs -> engine -> proof -> the folder that is left."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from capcli.captioning.model import open_engine
from capcli.decoding.settings import Settings, resolve
from capcli.engine.engine_json import Engine, engine_of, hash_files, write_engine
from capcli.errors import CapcliError, UsageError
from capcli.export.folder import build_folder, put_in_place, target_folder, written
from capcli.export.images import listed, loaded
from capcli.export.origin import CheckpointOrigin, Origin
from capcli.export.parity import SLOTS, ParityResult, Pixels, check_parity, draw_images, searches
from capcli.models.dtypes import choose_device
from capcli.models.hub import find_model
from capcli.models.model_files import ENGINE, GENERATION, ModelFiles
from capcli.options import ExportOptions, GenerationOptions
from capcli.pixels import PixelSpec
from capcli.progress import say, warn
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.ort import import_onnxruntime, own_device

MOST_TOKENS = 64  # of a proof's captions


def run(options: ExportOptions) -> int:
    """Build an engine and prove it; the exit code.

    Raises UsageError for what cannot be meant, before anything is fetched, loaded or exported, as far as it shows by then,
    and CapcliError when it cannot be built or fails its proof.
    """
    out = target_folder(options)
    onnxruntime = import_onnxruntime(options.profile)
    device = choose_device(options.device)
    if options.kind == "onnx" and options.device == "auto":
        device = own_device(device)
    refuse_elsewhere(options, device)
    paths = listed(options)
    model = find_model(options.model, options.revision, quiet=options.quiet)
    if options.threads:
        torch.set_num_threads(options.threads)
    note = silent if options.quiet else say
    engine = engine_of(model)
    origin: Origin = (
        CheckpointOrigin(options, model, out) if engine is None else unfinished(options, model, engine, out)
    )
    settings = replace(built_for(options, origin.generation, origin.positions), encoder_ids=origin.encoder_ids)
    images = loaded(paths, PixelSpec.from_config(model.processor), origin.size) if paths else draw_images(origin.size)
    with build_folder(out) as building:
        note(f"exporting {options.model}")
        engine = replace(origin.write(building, settings), versions={"onnxruntime": onnxruntime.__version__})
        if options.kind == "tensorrt":
            from capcli.export.pending import with_plans

            engine = with_plans(building, out, engine, device, note)
        engine = replace(engine, files=hashed(building))
        proof = proved(open_engine(building, engine, device), origin, images, settings, engine)
        engine = replace(engine, proof={**proof.facts(), "device": device_name(device)})
        note(proof.line())
        if not proof.passed and not options.force:
            raise CapcliError(f"the engine failed its proof: {proof.failed}. It was not kept; --force keeps it")
        with written(out):
            write_engine(building, engine)
        put_in_place(building, out, overwrite=options.overwrite or out == os.path.realpath(model.folder))
    if not proof.passed:
        warn(f"kept by --force, and it failed its proof: {proof.failed}")
    note(f"{out}: {size_of(out) / 1e6:,.1f} MB; capcli caption FOLDER --model {shlex.quote(out)}")
    return 0


def unfinished(options: ExportOptions, model: ModelFiles, engine: Engine, out: str) -> Origin:
    from capcli.export.pending import PendingOrigin

    return PendingOrigin(options, model, engine, out)


def hashed(folder: str) -> dict[str, str]:
    """The SHA-256 of all that captions hang on but the generation settings, which are a user's to change."""
    return hash_files(folder, sorted(set(os.listdir(folder)) - {GENERATION, ENGINE}))


def refuse_elsewhere(options: ExportOptions, device: torch.device) -> None:
    """Raises UsageError for what cannot be proved on this device."""
    if options.kind == "onnx" and options.dtype == "bfloat16" and device.type == "cpu":
        raise UsageError("--dtype bfloat16: ONNX Runtime computes in it on CUDA only, where the export must run then")
    if options.quantize and device.type != "cpu":
        raise UsageError(f"--quantize {options.quantize} is for CPUs: prove it on one, with --device cpu")
    if options.kind == "tensorrt" and options.device == "cpu":
        raise UsageError("--device cpu: plans are built and proved on a GPU; leave it out")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def proved(
    runtime: SlotRuntime, origin: Origin, images: list[Pixels], settings: Settings, engine: Engine
) -> ParityResult:
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, MOST_TOKENS))
    beams = (1, 4) if engine.kind == "onnx" else (settings.rows,)
    batches = [bucket.slots for bucket in engine.buckets] or [SLOTS]
    truth = origin.truth(runtime.device)
    return check_parity(runtime, truth, images, searches(settings, beams), engine.precision, batches, origin.against)


def built_for(options: ExportOptions, generation: Mapping[str, Any], positions: int) -> Settings:
    """The search that plans are built for and the proof begins from.

    Raises CapcliError for generation settings that capcli does not do.
    """
    asked = GenerationOptions(num_beams=options.num_beams, max_new_tokens=options.max_new_tokens)
    settings = resolve(generation, asked)
    room = positions - len(settings.prompt) + 1
    if options.max_new_tokens is not None and options.max_new_tokens > room:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: the decoder holds {room} here")
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))


def size_of(folder: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def silent(line: str) -> None:
    """Where nothing is to be said."""
