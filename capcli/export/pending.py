"""TensorRT plans from graphs, and engines whose graphs wait for TensorRT: these can be finished without the captioner."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from capcli.decoding.settings import Settings
from capcli.engine.check import refuse_tampered
from capcli.engine.engine_json import Engine, hash_files, write_engine
from capcli.errors import CapcliError, UsageError
from capcli.export import tensorrt
from capcli.export.folder import copy, is_unfinished, put_in_place, writing
from capcli.models.checkpoint import own_generation
from capcli.models.model_files import GENERATION, ModelFiles, is_engine
from capcli.options import ExportOptions
from capcli.options.export_command import finishing, in_folder
from capcli.runtimes import trt
from capcli.runtimes.base import SlotRuntime
from capcli.text import flag

UNFINISHED = "its plans are not built yet"
GRAPHS = (".onnx", ".onnx.data")
CAPTIONER = "give the captioner that it was built from"


class PendingOrigin:
    """An engine whose plans are not built yet, as a `capcli.export.origin.Origin`."""

    against = "its graphs' in ONNX Runtime"
    encoder_ids: tuple[int, ...] = ()

    def __init__(self, options: ExportOptions, model: ModelFiles, engine: Engine, out: str) -> None:
        """Raises CapcliError for one that has changed or cannot be finished here.

        Raises UsageError for a finished engine, and for options that differ from those of its graphs.
        """
        if options.kind != "tensorrt" or not engine.unfinished:
            raise UsageError(f"{model.name} is already an engine: {CAPTIONER}")
        self.generation = own_generation(model) or {}
        refuse_other_options(options, engine, self.generation)
        if engine.dtype == "bfloat16":
            raise UsageError(f"{model.name} is in bfloat16, which no CPU runs for the parity check: {CAPTIONER}")
        tensorrt.require_tensorrt()
        refuse_tampered(model.folder, engine)
        self.folder = model.folder
        self.engine = replace(engine, command=in_folder(engine.command, out))
        self.positions, self.size = engine.positions, engine.pixels

    def write(self, folder: str, settings: Settings) -> Engine:  # noqa: ARG002
        """Copies the engine's files. Raises CapcliError where it cannot."""
        for name in (GENERATION, *self.engine.files):
            copy(os.path.join(self.folder, name), os.path.join(folder, name))
        return self.engine

    def reference(self, device: torch.device) -> SlotRuntime:  # noqa: ARG002
        """The graphs themselves, on the CPU."""
        from capcli.runtimes.ort import open_ort

        return open_ort(self.folder, self.engine, torch.device("cpu"))


def refuse_other_options(options: ExportOptions, engine: Engine, generation: dict[str, Any]) -> None:
    """Raises UsageError for an option with another value than the engine's graphs and buckets have."""
    fixed = {
        "dtype": engine.dtype,
        "profile": engine.profile,
        "batch_sizes": tuple(bucket.slots for bucket in engine.buckets),
        "num_beams": generation.get("num_beams"),
        "max_new_tokens": generation.get("max_new_tokens"),
    }
    for name, value in fixed.items():
        if getattr(options, name) not in (value, getattr(ExportOptions("tensorrt"), name)):
            raise UsageError(
                f"{flag(name)}: the graphs of {options.model} are for {value}; leave it out, or {CAPTIONER}"
            )


def with_plans(building: str, out: str, engine: Engine, device: torch.device, note: Callable[[str], None]) -> Engine:
    """Replaces the graphs in the folder `building` by plans for this GPU.

    Where TensorRT or a GPU is missing, the graphs are kept in `out`; CapcliError says what is missing, and the command
    that finishes the engine.
    """
    names = [name for name in os.listdir(building) if name.endswith(GRAPHS)]
    graphs = hash_files(building, sorted(names))
    try:
        module = tensorrt.require_tensorrt()
    except CapcliError as missing:
        kept = keep_unfinished(building, out, engine)
        finish, also = shlex.join(finishing(in_folder(engine.command, kept))), ""
        if engine.dtype == "bfloat16":
            finish, also = engine.rebuild, " and the captioner"
        raise CapcliError(
            f"{missing}. The graphs for TensorRT are in {kept}; on a machine with an NVIDIA GPU and TensorRT{also}, "
            f"this finishes the engine: {finish}"
        ) from missing
    version, gpu = module.__version__, trt.this_gpu(device)
    tensorrt.build_plans(
        building, engine.buckets, timing_cache=tensorrt.timing_cache_path(out, version, gpu), note=note, tensorrt=module
    )
    for name in names:
        os.remove(os.path.join(building, name))
    return replace(engine, versions={"tensorrt": version}, gpu=gpu, graphs=graphs)


def keep_unfinished(building: str, out: str, engine: Engine) -> str:
    """Renames the folder of graphs to `out`, or to a name next to it if a finished engine is there; returns the new path."""
    files = hash_files(building, sorted(set(os.listdir(building)) - {GENERATION}))
    with writing(out):
        write_engine(building, replace(engine, files=files, parity={"passed": False, "failed": UNFINISHED}))
    taken = os.path.isdir(out) and os.listdir(out) and not is_unfinished(out)
    kept = f"{out}-unfinished" if taken else out
    put_in_place(building, kept, overwrite=is_engine(kept))
    return kept
