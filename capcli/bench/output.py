"""What `capcli bench` prints: the ceiling, the stages, the contest, and a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from capcli.bench.contest import ContestantResult, equal_share
from capcli.bench.stages import Stages
from capcli.options import BenchOptions
from capcli.text import counted

if TYPE_CHECKING:
    from capcli.bench.ceiling import CaptionCost, Rates
    from capcli.bench.run import Comparison


@dataclass(frozen=True, slots=True)
class Profile:
    """Stages, and what the ceiling is made of: None for an engine, whose arithmetic its graphs hide."""

    stages: Stages
    work: CaptionCost | None
    rates: Rates | None
    dtype: str

    @property
    def ceiling(self) -> float | None:
        """Images per second."""
        if self.work is None or self.rates is None:
            return None
        return self.work.images_per_second(self.rates, self.stages.tokens)


def result(measured: Comparison, options: BenchOptions) -> None:
    """Tables for people, unless JSON alone is asked for, and last the line of JSON."""
    if not options.json:
        if measured.profile is not None:
            profile(measured.profile)
        contest(measured)
    print(json.dumps(document(measured)))


def profile(found: Profile) -> None:
    if found.work is not None and found.rates is not None:
        work, rates = found.work, found.rates
        print(f"ceiling, {found.dtype}: {found.ceiling:.1f} images/s")
        print(
            f"  measured here: {rates.flops / 1e9:,.0f} GFLOP/s in matrix products, {rates.bandwidth / 1e9:.1f} GB/s read"
        )
        print(f"  an image: {work.encode_flops / 1e9:.2f} GFLOP to encode, {found.stages.tokens:.1f} tokens to say")
        print(
            f"  a step of {work.slots} slots: {work.step_flops / 1e9:.2f} GFLOP, {work.step_bytes / 1e6:.0f} MB to read"
        )
    once = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.stages.once.items())
    print(f"once: {once}")
    whole = sum(found.stages.each.values())
    print("an image, ms, each stage by itself:")
    for name, seconds in found.stages.each.items():
        print(f"  {name:<8}{seconds * 1e3:10.3f}{seconds / whole:8.1%}")
    print(f"  {'all':<8}{whole * 1e3:10.3f}   {1 / whole:.1f} images/s one after another")


def contest(measured: Comparison) -> None:
    images, rounds = counted(measured.images, "image"), counted(len(measured.ours.rounds), "round")
    print(f"{images}, files in, rows out, medians of {rounds} in turns:")
    print(f"  {'':<10}{'images/s':>9}{'capcli is':>11}{'equal':>8}  {'in':<9} batch")
    ceiling = measured.profile.ceiling if measured.profile else None
    share = "" if ceiling is None else f"  {measured.ours.rate / ceiling:.0%} of the ceiling"
    print(f"  {'capcli':<10}{measured.ours.rate:9.2f}{'':>11}{'':>8}  {computed(measured.ours)}{share}")
    for peer in measured.peers:
        if not peer.rounds:
            print(f"  {peer.name:<10}could not run: {peer.failed}")
            continue
        equal = equal_share(measured.ours.rounds[-1], peer.rounds[-1])
        ratio = f"{measured.ratio(peer):.2f}x"
        print(f"  {peer.name:<10}{peer.rate:9.2f}{ratio:>11}{equal:8.1%}  {computed(peer)}")


def computed(told: ContestantResult) -> str:
    """In what it computed, and how many images at a time."""
    decoded = ", JPEGs decoded on the GPU" if told.facts.get("gpu_decode") else ""
    return f"{told.facts['dtype']:<9} {told.facts['batch_size']}{decoded}"


def document(measured: Comparison) -> dict[str, Any]:
    """All of it for programs; times in seconds."""
    found = measured.profile
    contestants = {}
    for told in (measured.ours, *measured.peers):
        contestants[told.name] = told.facts | {"seconds": [each.seconds for each in told.rounds], "failed": told.failed}
        if told.rounds:
            contestants[told.name]["images_per_second"] = told.rate
        if told is not measured.ours and told.rounds:
            equal = equal_share(measured.ours.rounds[-1], told.rounds[-1])
            contestants[told.name] |= {"ratio": measured.ratio(told), "equal": equal}
    made: dict[str, Any] = {"images": measured.images, "contestants": contestants}
    if found is not None:
        made |= {"dtype": found.dtype, "stages": asdict(found.stages), "ceiling": found.ceiling}
        made |= {
            "rates": asdict(found.rates) if found.rates else None,
            "work": asdict(found.work) if found.work else None,
        }
    return made
