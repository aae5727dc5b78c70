"""`capcli bench` on one page: photos -> stages, ceiling, contest -> a table and a line of JSON."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from capcli import pixels
from capcli.bench import output, stages
from capcli.bench.contest import Contestant, ContestantResult, contest
from capcli.captioning.model import choose_dtype, device_of
from capcli.captioning.plan import load_captioner, search_settings
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

PEERS = os.path.join(os.path.dirname(__file__), "peers.py")


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that a bench found; `profile` None where it was quick."""

    images: int
    profile: output.Profile | None
    ours: ContestantResult
    peers: list[ContestantResult]

    def ratio(self, peer: ContestantResult) -> float:
        """How many times as fast capcli is."""
        return self.ours.rate / peer.rate


def run(options: BenchOptions) -> int:
    """Measure and print; the exit code: 1 where it is not so fast as `at_least` asks.

    Raises UsageError for what cannot be meant, CapcliError where nothing can be measured.
    """
    files = find_model(options.model)  # fetched before clocks run, and by one process
    refuse_peers(options, files)
    engine = engine_of(files)
    choose_dtype(options.dtype, device_of(options.device, engine), engine)  # which may refuse
    photos = listed(options)
    profile = None if options.quick else profiled(options, photos)
    measured = contested(options, photos, profile)
    if measured.ours.failed is not None:
        raise CapcliError(f"capcli itself could not caption these: {measured.ours.failed}")
    if options.gpu_decode and not measured.ours.facts["gpu_decode"]:
        warn("--gpu-decode had no effect: decoder processes are quicker here")
    output.result(measured, options)
    least = options.at_least or 0.0
    slow = [peer for peer in measured.peers if peer.rounds and measured.ratio(peer) < least]
    silent = [peer for peer in measured.peers if not peer.rounds]
    for peer in slow:
        warn(f"{measured.ratio(peer):.2f} times as fast as {peer.name}, and {least:g} were asked for")
    for peer in silent:
        warn(f"{peer.name} could not be compared with")
    return 1 if slow or silent else 0


def refuse_peers(options: BenchOptions, files: ModelFiles) -> None:
    """Raises UsageError where no peer can run the model."""
    if not options.against:
        return
    if files.is_engine:
        raise UsageError(f"peers run a captioner's weights, and {options.model} is an engine: leave --against out")
    if encoder_prompt_of(files.config) is not None:
        raise UsageError(f"the encoder of {options.model} is asked a question, which no peer does: leave --against out")


def listed(options: BenchOptions) -> list[str]:
    """The photos, without those that cannot be used: a contest is over the same images for all."""
    source = open_source(SourceOptions(sources=options.photos), warn, None)
    bad: list[str] = []
    photos = list(islice(usable((os.path.abspath(entry.path) for entry in source), bad), options.limit))
    if bad:
        warn(
            f"{len(bad)} cannot be captioned and {'is' if len(bad) == 1 else 'are'} left out, such as {printable(bad[0])}"
        )
    if not photos:
        raise CapcliError(f"there is no image in {', '.join(options.photos)}")
    return photos


def usable(paths: Iterable[str], bad: list[str]) -> Iterator[str]:
    """Those that can be decoded; the others go to `bad`."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                pixels.read(file.read(), max_pixels=MAX_PIXELS)
        except (ImageError, OSError):
            bad.append(path)
        else:
            yield path


def caption_options(options: BenchOptions, photos: list[str]) -> CaptionOptions:
    return CaptionOptions(
        source=SourceOptions(sources=tuple(photos)),
        sink=SinkOptions(),
        generation=options.generation,
        model=options.model,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        quiet=True,
    )


def profiled(options: BenchOptions, photos: list[str]) -> output.Profile:
    """Stages, and the ceiling. The captioner is let go again: contestants have their own."""
    from capcli.bench.ceiling import cost_of, peak_rates

    wanted = caption_options(options, photos)
    began = time.perf_counter()
    captioner = load_captioner(wanted, None)
    loading = time.perf_counter() - began
    settings = search_settings(wanted, captioner)
    found = stages.measure(captioner, settings, photos, options.batch_size)
    found.once = {"start-up": stages.start_up(), "load": loading}
    if captioner.files.is_engine:
        return output.Profile(found, None, None, captioner.model.dtype)
    dtype, device = captioner.model.dtype, captioner.model.runtime.device
    work = cost_of(captioner.files, captioner.model.size, settings, found.slots, dtype)
    return output.Profile(found, work, peak_rates(device, dtype), dtype)


def contested(options: BenchOptions, photos: list[str], profile: output.Profile | None) -> Comparison:
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
    folder, device = find_model(options.model).folder, str(choose_device(options.device))
    search = {name: value for name, value in task["generation"].items() if name != "seed"}
    with ExitStack() as stack:
        ours = Contestant("capcli", [sys.executable, "-m", "capcli.bench.ours"], task)
        everyone = [stack.enter_context(ours)]
        for name in options.against:
            theirs = task | {"model": folder, "how": name, "device": device, "generation": search}
            everyone.append(
                stack.enter_context(Contestant(name, [options.peer_python or sys.executable, PEERS], theirs))
            )
        contest(everyone, options.rounds)
    told = [each.told for each in everyone]
    return Comparison(len(photos), profile, told[0], told[1:])
