"""What a run is made of where the command leaves it open: captioner, search settings, shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from capcli.captioning.captioner import Captioner
from capcli.captioning.model import Model, choose_dtype, device_of, load_model
from capcli.captioning.provenance import earlier_shapes
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
from capcli.models.packing import keep_memory_mapped
from capcli.options import CaptionOptions
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.records import Entry
from capcli.sources import Source

COUNTED = 8  # times the slots that pay: of so many images or fewer the number is known before the first is captioned


def load_captioner(options: CaptionOptions, receipt: dict[str, Any] | None) -> Captioner:
    """The captioner, in the dtype and on as many threads as an earlier run had, unless these are asked for."""
    earlier = receipt or {}
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_memory_mapped()
    files = find_model(options.model, options.revision, quiet=options.quiet)
    refuse_unread(options, files.config)
    engine = engine_of(files)
    device = device_of(options.device, engine)
    if options.gpu_decode:
        refuse_gpu_decode(PixelSpec.from_config(files.processor), device)
    own = own_generation(files)
    if own is not None:
        resolve(own, options.generation)  # what is wrong with the settings is told before the weights are read
    dtype: str = options.dtype
    if dtype == "auto" and engine is None:
        dtype = earlier.get("settings", {}).get("dtype") or "auto"
        if dtype == "int8" and (why := int8_refused(device)):
            raise UsageError(
                f"{options.sink.out} was begun in int8, and {why}: go on where it was begun, name another --out, or begin it "
                "anew with --overwrite"
            )
    dtype = choose_dtype(dtype, device, engine)
    most = usable_cpus()
    torch.set_num_threads(options.threads or min(earlier.get("threads") or torch.get_num_threads(), most))
    return Captioner(load_model(files, engine, device, dtype), files)


def refuse_unread(options: CaptionOptions, config: Mapping[str, Any]) -> None:
    """Raises UsageError for tags and tasks that a captioner with this config.json does not know."""
    if options.tags_field and not tag_room(config):
        raise UsageError(f"--tags-field {options.tags_field}: {options.model} reads no tags: leave it out")
    refuse = getattr(family_of(config), "refuse_prompt", None)
    if refuse and options.prompt:
        refuse(options.prompt)


def decoder_processes(options: CaptionOptions, device: torch.device) -> int:
    """How many processes decode images."""
    if options.workers is not None:
        return options.workers
    return default_workers(usable_cpus(), on_gpu=device.type == "cuda")


def settle_gpu_decode(options: CaptionOptions, model: Model, receipt: Mapping[str, Any] | None) -> CaptionOptions:
    """`options`, with JPEGs decoded on the GPU where that was asked for and is quicker, or was when an earlier run began.

    Raises CapcliError where the GPU decodes none.
    """
    if not options.gpu_decode:
        return options
    if receipt is not None:
        begun = bool(receipt.get("settings", {}).get("gpu_decode"))
        if not begun:
            warn(
                f"--gpu-decode has no effect: {options.sink.out} was begun with decoder processes alone, and goes on so"
            )
        return replace(options, gpu_decode=begun)
    processes = decoder_processes(options, model.runtime.device)
    ours, process = rates(GpuJpegDecoder.on(model.runtime.device, model.spec))
    if ours <= process * processes:
        warn(
            f"--gpu-decode has no effect: the GPU decodes {ours:,.0f} photos a second here, "
            f"and {processes} x {process:,.0f} by processes are more"
        )
    return replace(options, gpu_decode=ours > process * processes)


def own_sequences(model: str) -> int:
    """Captions per image that a model in a folder asks for itself; 1 where that is not known before it is fetched."""
    try:
        with open(os.path.join(os.path.expanduser(model), "generation_config.json"), encoding="utf-8") as file:
            asked = json.load(file).get("num_return_sequences")
    except (OSError, ValueError, AttributeError):
        return 1
    return asked if isinstance(asked, int) else 1


def search_settings(options: CaptionOptions, captioner: Captioner) -> Settings:
    settings = captioner.settings(options.generation, options.prompt)
    for line in idle(options.generation, settings):
        warn(line)
    if options.keep_prompt and captioner.model.encoder_prompt:
        warn("--keep-prompt has no effect: the prompt is asked of the encoder, and no caption begins with it")
    if settings.num_return_sequences > 1 and not options.sink.candidates:
        n = settings.num_return_sequences
        raise CapcliError(
            f"the model's generation_config asks for {n} captions per image: say --num-return-sequences {n}, or 1"
        )
    return settings


def choose_shapes(
    options: CaptionOptions,
    captioner: Captioner,
    settings: Settings,
    wanted: Iterator[Entry],
    source: Source,
    receipt: Mapping[str, Any] | None,
) -> tuple[Shapes, Iterator[Entry]]:
    """The shapes of the run, and all of `wanted` again, of which the first may have been counted.

    Those of an earlier run that was cut short, so that captions stay the same to the bit; else what `--batch-size` says, or
    what pays, fits and is needed for so many images, where that can be known.
    """
    device = captioner.model.runtime.device
    earlier = earlier_shapes(receipt, device, options.batch_size)
    if earlier is not None:
        # with fewer threads fewer loops, each as it was
        return replace(earlier, loops=min(earlier.loops, torch.get_num_threads())), wanted
    first: list[Entry] = []
    count = None
    if not source.streaming:
        most = options.batch_size or COUNTED * useful_slots(device, settings)
        first = list(islice(wanted, most))
        count = len(first) if len(first) < most else None
    at_a_time = min((n for n in (count, options.batch_size) if n is not None), default=None)
    loops = len(captioner.model.runtime.replicas(useful_loops(torch.get_num_threads(), at_a_time)))
    return captioner.shapes(settings, count, options.batch_size, loops), chain(first, wanted)
