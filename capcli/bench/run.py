"""The main function of `capcli bench`: photos -> ceiling, stages, rounds with the baselines -> tables and a line of JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from typing import Any

from capcli import pixels
from capcli.bench import output, stages
from capcli.bench.output import BenchResult, Profile
from capcli.bench.processes import BenchProcess, run_rounds
from capcli.captioning.backends.slots_plan import load_captioner, search_settings
from capcli.captioning.model import choose_dtype, device_of
from capcli.engine.engine_json import engine_of
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.models.dtypes import choose_device
from capcli.models.families import encoder_prompt_of
from capcli.models.hub import find_model
from capcli.models.model_files import ModelFiles
from capcli.options import MAX_PIXELS, BenchOptions, CaptionOptions, SinkOptions, SourceOptions
from capcli.progress import warn
from capcli.sources import open_source
from capcli.text import printable

BASELINES = os.path.join(os.path.dirname(__file__), "baselines.py")


def run(options: BenchOptions) -> int:
    """Measure and print. Returns the exit code: 1 where capcli is slower than `at_least` or a baseline did not run.

    Raises UsageError for options that contradict the model, CapcliError where nothing can be measured.
    """
    files = find_model(options.model)  # downloaded before anything is timed, by one process
    refuse_baselines(options, files)
    engine = engine_of(files)
    choose_dtype(options.dtype, device_of(options.device, engine), engine)  # raises where the dtype is not possible
    photos = list_photos(options)
    result = compare(options, photos, None if options.quick else profile(options, photos))
    if result.capcli.failed is not None:
        raise CapcliError(f"capcli could not caption the photos: {result.capcli.failed}")
    if options.gpu_decode and not result.capcli.facts["gpu_decode"]:
        warn("--gpu-decode had no effect: decoder processes are faster here")
    output.show(result, options)
    minimum = options.at_least or 0.0
    slow = [each for each in result.baselines if each.rounds and result.ratio(each) < minimum]
    failed = [each for each in result.baselines if not each.rounds]
    for baseline in slow:
        warn(
            f"capcli is {result.ratio(baseline):.2f} times as fast as {baseline.name}, less than --at-least {minimum:g}"
        )
    for baseline in failed:
        warn(f"{baseline.name} did not run")
    return 1 if slow or failed else 0


def refuse_baselines(options: BenchOptions, files: ModelFiles) -> None:
    """Raises UsageError where no baseline can run the model."""
    if not options.against:
        return
    if files.is_engine:
        raise UsageError(f"{options.model} is an engine, which no baseline can run: leave --against out")
    if encoder_prompt_of(files.config) is not None:
        raise UsageError(
            f"the encoder of {options.model} takes a prompt, which no baseline supports: leave --against out"
        )


def list_photos(options: BenchOptions) -> list[str]:
    """Absolute paths of the photos that can be decoded, so that all processes caption the same images."""
    source = open_source(SourceOptions(sources=options.photos), warn, None)
    bad: list[str] = []
    photos = list(islice(decodable((os.path.abspath(entry.path) for entry in source), bad), options.limit))
    if bad:
        warn(f"left out because they cannot be decoded: {len(bad)}, such as {printable(bad[0])}")
    if not photos:
        raise CapcliError(f"there is no image in {', '.join(options.photos)}")
    return photos


def decodable(paths: Iterable[str], bad: list[str]) -> Iterator[str]:
    """The paths that can be decoded; the others are added to `bad`."""
    for path in paths:
        try:
            pixels.read(path, max_pixels=MAX_PIXELS)
        except ImageError:
            bad.append(path)
        else:
            yield path


def profile(options: BenchOptions, photos: list[str]) -> Profile:
    """The stages and the ceiling. The captioner is freed afterwards: the rounds run in processes of their own."""
    from capcli.bench.ceiling import cost_of, peak_rates

    caption_options = CaptionOptions(
        source=SourceOptions(sources=tuple(photos)),
        sink=SinkOptions(),
        generation=options.generation,
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        quiet=True,
    )
    began = time.perf_counter()
    captioner = load_captioner(caption_options, None)
    load = time.perf_counter() - began
    settings = search_settings(caption_options, captioner)
    found = stages.measure(captioner, settings, photos, options.batch_size)
    found.once = {"start-up": stages.start_up(), "load": load}
    dtype, device = captioner.model.dtype, captioner.model.runtime.device
    if captioner.files.is_engine:
        return Profile(found, None, None, dtype)
    cost = cost_of(captioner.files, captioner.model.size, settings, found.slots, dtype)
    return Profile(found, cost, peak_rates(device, dtype), dtype)


def compare(options: BenchOptions, photos: list[str], profile: Profile | None) -> BenchResult:
    """Run the rounds of capcli and of each baseline."""
    task: dict[str, Any] = {
        "files": photos,
        "model": options.model,
        "generation": asdict(options.generation),
        "device": options.device,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "threads": options.threads,
        "gpu_decode": options.gpu_decode,
    }
    baseline_task = task | {
        "model": find_model(options.model).folder,
        "device": str(choose_device(options.device)),
        "generation": {name: value for name, value in task["generation"].items() if name != "seed"},
    }
    python = options.peer_python or sys.executable
    with ExitStack() as stack:
        command = [sys.executable, "-m", "capcli.bench.capcli_process"]
        processes = [stack.enter_context(BenchProcess("capcli", command, task))]
        for name in options.against:
            process = BenchProcess(name, [python, BASELINES], baseline_task | {"how": name})
            processes.append(stack.enter_context(process))
        run_rounds(processes, options.rounds)
    capcli, *baselines = [process.result for process in processes]
    return BenchResult(len(photos), profile, capcli, baselines)
