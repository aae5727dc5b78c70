"""The main function of `capcli export`: captioner -> graphs -> engine -> parity check -> the engine's folder."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from capcli.captioning.model import open_engine
from capcli.decoding.settings import Settings, resolve
from capcli.engine.engine_json import Engine, engine_of, hash_files, write_engine
from capcli.errors import CapcliError, UsageError
from capcli.export.folder import build_folder, put_in_place, target_folder, writing
from capcli.export.origin import CheckpointOrigin, Origin
from capcli.export.parity import SLOTS, ParityResult, Pixels, check_parity, searches
from capcli.export.parity_images import draw_images, image_paths, load_images
from capcli.models.dtypes import choose_device
from capcli.models.hub import find_model
from capcli.models.model_files import ENGINE, GENERATION, ModelFiles
from capcli.options import ExportOptions, GenerationOptions
from capcli.pixels import PixelSpec
from capcli.progress import say, warn
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.ort import import_onnxruntime, own_device

MAX_TOKENS = 64  # of a caption in the parity check


def run(options: ExportOptions) -> int:
    """Builds an engine and checks its parity with PyTorch; returns the exit code.

    Raises UsageError for wrong options, before anything is downloaded, loaded or exported where possible, and
    CapcliError when the engine cannot be built or fails its parity check.
    """
    out = target_folder(options)
    onnxruntime = import_onnxruntime(options.profile)
    device = choose_device(options.device)
    if options.kind == "onnx" and options.device == "auto":
        device = own_device(device)
    refuse_device(options, device)
    paths = image_paths(options)
    model = find_model(options.model, options.revision, quiet=options.quiet)
    if options.threads:
        torch.set_num_threads(options.threads)
    note = silent if options.quiet else say
    origin = origin_of(options, model, out)
    settings = replace(search_of(options, origin.generation, origin.positions), encoder_ids=origin.encoder_ids)
    spec = PixelSpec.from_config(model.processor)
    images = load_images(paths, spec, origin.size) if paths else draw_images(origin.size)
    with build_folder(out) as building:
        note(f"exporting {options.model}")
        engine = replace(origin.write(building, settings), versions={"onnxruntime": onnxruntime.__version__})
        if options.kind == "tensorrt":
            from capcli.export.pending import with_plans

            engine = with_plans(building, out, engine, device, note)
        engine = replace(engine, files=file_hashes(building))
        parity = parity_of(open_engine(building, engine, device), origin, images, settings, engine)
        engine = replace(engine, parity={**parity.facts(), "device": device_name(device)})
        note(parity.line())
        if not parity.passed and not options.force:
            raise CapcliError(f"the engine failed its parity check: {parity.failed}. It was not kept; --force keeps it")
        with writing(out):
            write_engine(building, engine)
        put_in_place(building, out, overwrite=options.overwrite or out == os.path.realpath(model.folder))
    if not parity.passed:
        warn(f"the engine failed its parity check and is kept because of --force: {parity.failed}")
    note(f"{out}: {size_of(out) / 1e6:,.1f} MB; capcli caption FOLDER --model {shlex.quote(out)}")
    return 0


def origin_of(options: ExportOptions, model: ModelFiles, out: str) -> Origin:
    engine = engine_of(model)
    if engine is None:
        return CheckpointOrigin(options, model, out)
    from capcli.export.pending import PendingOrigin

    return PendingOrigin(options, model, engine, out)


def file_hashes(folder: str) -> dict[str, str]:
    """The SHA-256 of every file that captions depend on but the generation settings, which users may change."""
    return hash_files(folder, sorted(set(os.listdir(folder)) - {GENERATION, ENGINE}))


def refuse_device(options: ExportOptions, device: torch.device) -> None:
    """Raises UsageError for an engine whose parity check cannot run on this device."""
    if options.kind == "onnx" and options.dtype == "bfloat16" and device.type == "cpu":
        raise UsageError("--dtype bfloat16: ONNX Runtime computes in it on CUDA only, so export it on a GPU")
    if options.quantize and device.type != "cpu":
        raise UsageError(f"--quantize {options.quantize} is for CPUs: give --device cpu for its parity check")
    if options.kind == "tensorrt" and options.device == "cpu":
        raise UsageError("--device cpu: plans are built and checked on a GPU; leave it out")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def parity_of(
    runtime: SlotRuntime, origin: Origin, images: list[Pixels], settings: Settings, engine: Engine
) -> ParityResult:
    """Graphs are checked with 1 and 4 beams, plans with the beams and every number of slots that they are built for."""
    settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, MAX_TOKENS))
    beams = (1, 4) if engine.kind == "onnx" else (settings.rows,)
    batches = [bucket.slots for bucket in engine.buckets] or [SLOTS]
    reference = origin.reference(runtime.device)
    with float32_convolutions():
        return check_parity(
            runtime, reference, images, searches(settings, beams), engine.precision, batches, origin.against
        )


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Within it convolutions on CUDA compute in float32: cuDNN takes TF32 by default, also for a float32 model."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def search_of(options: ExportOptions, generation: Mapping[str, Any], positions: int) -> Settings:
    """The search that plans are built for and that the parity check uses; `positions` is the decoder's limit.

    Raises CapcliError for generation settings that capcli does not support, UsageError for captions that are too long.
    """
    given = GenerationOptions(num_beams=options.num_beams, max_new_tokens=options.max_new_tokens)
    settings = resolve(generation, given)
    room = positions - len(settings.prompt) + 1
    if options.max_new_tokens is not None and options.max_new_tokens > room:
        raise UsageError(f"--max-new-tokens {options.max_new_tokens}: the decoder has room for {room}")
    return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))


def size_of(folder: str) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def silent(line: str) -> None:
    """Prints nothing; replaces `say` with --quiet."""
