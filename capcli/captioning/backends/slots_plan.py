"""The choices of a run on the slots backend before its first image: captioner, search settings, GPU decoding, batch size.

A run that continues an `earlier` one takes from its run file what the captions depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from capcli.captioning.model import Model, choose_dtype, device_of, load_model
from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.decoding.settings import Settings, idle, resolve
from capcli.decoding.shapes import Shapes, useful_loops, useful_slots
from capcli.engine.engine_json import engine_of
from capcli.errors import CapcliError, UsageError
from capcli.loading import default_workers, usable_cpus
from capcli.loading.gpu_jpeg import GpuJpegDecoder, rates, refuse_gpu_decode
from capcli.models.checkpoint import own_generation
from capcli.models.dtypes import choose_device
from capcli.models.families import family_of, tag_room
from capcli.models.hub import find_model
from capcli.models.int8 import int8_refused
from capcli.models.model_files import ModelFiles
from capcli.models.packing import keep_memory_mapped
from capcli.options import CaptionOptions
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.records import Entry
from capcli.sources import Source
from capcli.storage.run_file import RunFile

COUNTED = 8  # batches: a source of fewer images is counted before the first image, so that the batch fits it


def load_captioner(options: CaptionOptions, earlier: RunFile | None, files: ModelFiles | None = None) -> SlotCaptioner:
    """Load the captioner, in the dtype and on as many threads as the earlier run had unless the options name others.

    Raises UsageError before the weights are read where the model does not support the options.
    """
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_memory_mapped()
    files = files or find_model(options.model, options.revision, quiet=options.quiet)
    check_prompt_and_tags(options, files.config)
    engine = engine_of(files)
    device = device_of(options.device, engine)
    if options.gpu_decode:
        refuse_gpu_decode(PixelSpec.from_config(files.processor), device)
    generation = own_generation(files)
    if generation is not None:
        resolve(generation, options.generation)  # raises for wrong settings, before the weights are read
    dtype: str = options.dtype
    if dtype == "auto" and engine is None and earlier is not None:
        dtype = earlier.dtype or "auto"
        if dtype == "int8" and (reason := int8_refused(device)):
            raise UsageError(
                f"{options.sink.out} was started in int8, and {reason}: continue on the machine where it was started, choose "
                "another --out, or start from scratch with --overwrite"
            )
    dtype = choose_dtype(dtype, device, engine)
    threads = (earlier.threads if earlier else None) or torch.get_num_threads()
    torch.set_num_threads(options.threads or min(threads, usable_cpus()))
    return SlotCaptioner(load_model(files, engine, device, dtype), files)


def check_prompt_and_tags(options: CaptionOptions, config: Mapping[str, Any]) -> None:
    """Raises UsageError for tags, prompts and other options that a model with this config.json does not take."""
    given = {
        "--quantize": options.quantize,
        "--system": options.system,
        "--max-image-edge": options.max_image_edge,
    }
    if wrong := [flag for flag, value in given.items() if value is not None]:
        raise UsageError(f"{' and '.join(wrong)}: {options.model} has no use for it: leave it out")
    if options.tags_field and not tag_room(config):
        raise UsageError(f"--tags-field {options.tags_field}: {options.model} reads no tags: leave it out")
    refuse = getattr(family_of(config), "refuse_prompt", None)
    if refuse and options.prompt:
        refuse(options.prompt)


def search_settings(options: CaptionOptions, captioner: SlotCaptioner) -> Settings:
    """The search settings of the run, with a warning for each option that has no effect."""
    settings = captioner.settings(options.generation, options.prompt)
    for line in idle(options.generation, settings):
        warn(line)
    if options.keep_prompt and captioner.model.encoder_prompt:
        warn("--keep-prompt has no effect: the encoder reads the prompt, and no caption begins with it")
    refuse_dropped(options, settings.num_return_sequences)
    return settings


def refuse_dropped(options: CaptionOptions, captions: int) -> None:
    """Raises CapcliError where the model gives several `captions` per image and the rows have room for one."""
    if captions > 1 and not options.sink.candidates:
        raise CapcliError(
            f"the model's generation_config requests {captions} captions per image: give --num-return-sequences {captions}, or 1"
        )


def decoder_processes(options: CaptionOptions, device: torch.device) -> int:
    """How many processes decode images."""
    if options.workers is not None:
        return options.workers
    return default_workers(usable_cpus(), on_gpu=device.type == "cuda")


def settle_gpu_decode(options: CaptionOptions, model: Model, earlier: RunFile | None) -> CaptionOptions:
    """`options` with `gpu_decode` only where it was requested and is faster, or where the earlier run used it.

    Raises CapcliError where the GPU cannot decode JPEGs.
    """
    if not options.gpu_decode:
        return options
    if earlier is not None:
        if not earlier.gpu_decode:
            warn(f"--gpu-decode has no effect: {options.sink.out} was started without it and continues without it")
        return replace(options, gpu_decode=earlier.gpu_decode)
    processes = decoder_processes(options, model.runtime.device)
    gpu_rate, process_rate = rates(GpuJpegDecoder.on(model.runtime.device, model.spec))
    if gpu_rate <= process_rate * processes:
        warn(
            f"--gpu-decode has no effect: the GPU decodes {gpu_rate:,.0f} photos a second here, "
            f"and {processes} processes decode {process_rate:,.0f} each"
        )
    return replace(options, gpu_decode=gpu_rate > process_rate * processes)


def choose_shapes(
    options: CaptionOptions,
    captioner: SlotCaptioner,
    settings: Settings,
    wanted: Iterator[Entry],
    source: Source,
    earlier: RunFile | None,
) -> tuple[Shapes, Iterator[Entry]]:
    """The shapes of the run, and an iterator over all of `wanted`, of which the first entries may have been counted.

    The shapes of an interrupted earlier run are kept, so that captions stay bit-identical. Otherwise they follow
    from --batch-size, or from what is worthwhile on the device, and from the number of images where that is known.
    """
    device = captioner.model.runtime.device
    same = earlier_shapes(earlier, device, options.batch_size)
    if same is not None:
        # Fewer threads run fewer loops, each with the same shapes.
        return replace(same, loops=min(same.loops, torch.get_num_threads())), wanted
    first: list[Entry] = []
    count = None
    if not source.streaming:
        most = options.batch_size or COUNTED * useful_slots(device, settings)
        first = list(islice(wanted, most))
        count = len(first) if len(first) < most else None
    at_once = min((n for n in (count, options.batch_size) if n is not None), default=None)
    loops = len(captioner.model.runtime.replicas(useful_loops(torch.get_num_threads(), at_once)))
    return captioner.shapes(settings, count, options.batch_size, loops), chain(first, wanted)


def earlier_shapes(earlier: RunFile | None, device: torch.device, batch_size: int | None) -> Shapes | None:
    """The shapes of an interrupted earlier run; None after a finished run, on another device or batch size."""
    if earlier is None or earlier.finished or not earlier.device.startswith(device.type):
        return None
    if batch_size not in (None, earlier.batch_size):
        return None
    return None if earlier.shapes is None else Shapes(*earlier.shapes)
