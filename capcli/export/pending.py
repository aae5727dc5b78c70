"""From graphs that TensorRT reads to plans for the GPU here; and an engine that waits for that, which needs no captioner."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from capcli.decoding.settings import Settings
from capcli.engine.check import refuse_tampered
from capcli.engine.engine_json import Engine, hash_files, with_options, write_engine
from capcli.errors import CapcliError, UsageError
from capcli.export import tensorrt
from capcli.export.folder import copy, is_unfinished, put_in_place, written
from capcli.models.checkpoint import own_generation
from capcli.models.model_files import GENERATION, ModelFiles, is_engine
from capcli.options import ExportOptions
from capcli.runtimes import trt
from capcli.runtimes.base import SlotRuntime
from capcli.text import flag

UNFINISHED = "its plans are not built yet"
GRAPHS = (".onnx", ".onnx.data")
CAPTIONER = "give the captioner that it was built from"


class PendingOrigin:
    """An engine whose graphs wait for TensorRT, as what an export begins from: see `capcli.export.origin.Origin`.

    Raises CapcliError where it was changed or cannot be finished here, UsageError for another engine, or one that `options`
    want otherwise than it was left.
    """

    against = "its graphs' in ONNX Runtime"
    encoder_ids: tuple[int, ...] = ()

    def __init__(self, options: ExportOptions, model: ModelFiles, engine: Engine, out: str) -> None:
        if options.kind != "tensorrt" or not engine.unfinished:
            raise UsageError(f"{model.name} is an engine already: {CAPTIONER}")
        self.generation = own_generation(model) or {}
        refuse_other(options, engine, self.generation)
        if engine.dtype == "bfloat16":
            raise UsageError(f"{model.name} is of bfloat16, in which no CPU can prove its plans: {CAPTIONER}")
        tensorrt.require_tensorrt()
        refuse_tampered(model.folder, engine)
        self.folder = model.folder
        self.engine = replace(engine, command=with_options(engine.command, {"--out": out}))
        self.positions, self.size = engine.positions, engine.pixels

    def write(self, folder: str, settings: Settings) -> Engine:  # noqa: ARG002
        """Copies what there is. Raises CapcliError where it cannot."""
        for name in (GENERATION, *self.engine.files):
            copy(os.path.join(self.folder, name), os.path.join(folder, name))
        return self.engine

    def truth(self, device: torch.device) -> SlotRuntime:  # noqa: ARG002
        """The graphs themselves, on the CPU."""
        from capcli.runtimes.ort import open_ort

        return open_ort(self.folder, self.engine, torch.device("cpu"))


def refuse_other(options: ExportOptions, engine: Engine, generation: dict[str, Any]) -> None:
    """Raises UsageError for what was asked for and is not what was left: graphs and buckets are as they are."""
    left = {
        "dtype": engine.dtype,
        "profile": engine.profile,
        "batch_sizes": tuple(bucket.slots for bucket in engine.buckets),
        "num_beams": generation.get("num_beams"),
        "max_new_tokens": generation.get("max_new_tokens"),
    }
    for name, own in left.items():
        asked = getattr(options, name)
        if asked not in (own, getattr(ExportOptions("tensorrt"), name)):
            raise UsageError(
                f"{flag(name)}: {options.model} was left to be built for {own}; leave it out, or {CAPTIONER}"
            )


def with_plans(building: str, out: str, engine: Engine, device: torch.device, note: Callable[[str], None]) -> Engine:
    """Plans for the GPU here, in place of the graphs.

    Where TensorRT or a GPU is missing, the graphs that are ready for it stay in `out`, and CapcliError says what is missing
    and what finishes the engine.
    """
    names = [name for name in os.listdir(building) if name.endswith(GRAPHS)]
    graphs = hash_files(building, sorted(names))
    try:
        module = tensorrt.require_tensorrt()
    except CapcliError as missing:
        left = leave_unfinished(building, out, engine)
        finish, also = f"capcli export --trt --model {shlex.quote(left)}", ""
        if engine.dtype == "bfloat16":
            finish, also = engine.rebuild, " and the captioner"
        raise CapcliError(
            f"{missing}. The graphs that TensorRT reads are in {left}; on a machine with an NVIDIA GPU and TensorRT{also}, "
            f"this finishes it: {finish}"
        ) from missing
    version, gpu = module.__version__, trt.this_gpu(device)
    tensorrt.build_plans(
        building, engine.buckets, timing_cache=tensorrt.timing_cache_path(out, version, gpu), note=note, tensorrt=module
    )
    for name in names:
        os.remove(os.path.join(building, name))
    return replace(engine, versions={"tensorrt": version}, gpu=gpu, graphs=graphs)


def leave_unfinished(building: str, out: str, engine: Engine) -> str:
    """Puts the graphs where their engine will be, or beside an engine that is there; the folder."""
    files = hash_files(building, sorted(set(os.listdir(building)) - {GENERATION}))
    with written(out):
        write_engine(building, replace(engine, files=files, proof={"passed": False, "failed": UNFINISHED}))
    taken = os.path.isdir(out) and os.listdir(out) and not is_unfinished(out)
    left = f"{out}-unfinished" if taken else out
    put_in_place(building, left, overwrite=is_engine(left))
    return left
