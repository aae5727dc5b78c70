"""What `capcli bench` prints: the ceiling, the stages, the comparison with baselines, and a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from capcli.bench.processes import ProcessResult, equal_share
from capcli.bench.stages import Stages
from capcli.options import BenchOptions
from capcli.text import counted

if TYPE_CHECKING:
    from capcli.bench.ceiling import CaptionCost, Rates


@dataclass(frozen=True, slots=True)
class Profile:
    """The stages, and the cost and rates behind the ceiling: None for an engine, whose graphs are not counted."""

    stages: Stages
    cost: CaptionCost | None
    rates: Rates | None
    dtype: str

    @property
    def ceiling(self) -> float | None:
        """Images per second."""
        if self.cost is None or self.rates is None:
            return None
        return self.cost.images_per_second(self.rates, self.stages.tokens)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """All measurements; `profile` is None with --quick."""

    images: int
    profile: Profile | None
    capcli: ProcessResult
    baselines: list[ProcessResult]

    def ratio(self, baseline: ProcessResult) -> float:
        """How many times as fast as the baseline capcli is."""
        return self.capcli.rate / baseline.rate


def show(result: BenchResult, options: BenchOptions) -> None:
    """Print tables, unless only JSON is requested, and then the line of JSON."""
    if not options.json:
        if result.profile is not None:
            show_profile(result.profile)
        show_comparison(result)
    print(json.dumps(document(result)))


def show_profile(profile: Profile) -> None:
    stages, cost, rates = profile.stages, profile.cost, profile.rates
    if cost is not None and rates is not None:
        print(f"ceiling, {profile.dtype}: {profile.ceiling:.1f} images/s")
        print(f"  measured: {rates.flops / 1e9:,.0f} GFLOP/s in matrix products, {rates.bandwidth / 1e9:.1f} GB/s read")
        print(f"  an image: {cost.encode_flops / 1e9:.2f} GFLOP to encode, {stages.tokens:.1f} tokens to generate")
        print(
            f"  a step of {cost.slots} slots: {cost.step_flops / 1e9:.2f} GFLOP, {cost.step_bytes / 1e6:.0f} MB to read"
        )
    print("once: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.once.items()))
    total = sum(stages.each.values())
    print("per image, in ms, each stage measured separately:")
    for name, seconds in stages.each.items():
        print(f"  {name:<8}{seconds * 1e3:10.3f}{seconds / total:8.1%}")
    print(f"  {'all':<8}{total * 1e3:10.3f}   {1 / total:.1f} images/s one after another")


def show_comparison(result: BenchResult) -> None:
    capcli = result.capcli
    images, rounds = counted(result.images, "image"), counted(len(capcli.rounds), "round")
    print(f"{images}, from files to rows, medians of {rounds} in turns:")
    print(f"  {'':<10}{'images/s':>9}{'capcli is':>11}{'equal':>8}  {'in':<9} batch")
    ceiling = result.profile.ceiling if result.profile else None
    share = "" if ceiling is None else f"  {capcli.rate / ceiling:.0%} of the ceiling"
    print(f"  {'capcli':<10}{capcli.rate:9.2f}{'':>11}{'':>8}  {_setup(capcli)}{share}")
    for baseline in result.baselines:
        if not baseline.rounds:
            print(f"  {baseline.name:<10}could not run: {baseline.failed}")
            continue
        equal = equal_share(capcli.rounds[-1], baseline.rounds[-1])
        ratio = f"{result.ratio(baseline):.2f}x"
        print(f"  {baseline.name:<10}{baseline.rate:9.2f}{ratio:>11}{equal:8.1%}  {_setup(baseline)}")


def _setup(process: ProcessResult) -> str:
    """Its dtype and batch size."""
    decoded = ", JPEGs decoded on the GPU" if process.facts.get("gpu_decode") else ""
    return f"{process.facts['dtype']:<9} {process.facts['batch_size']}{decoded}"


def document(result: BenchResult) -> dict[str, Any]:
    """The JSON; times are in seconds."""
    processes = {}
    for process in (result.capcli, *result.baselines):
        fields = process.facts | {"seconds": [each.seconds for each in process.rounds], "failed": process.failed}
        if process.rounds:
            fields["images_per_second"] = process.rate
        if process.rounds and process is not result.capcli:
            fields["ratio"] = result.ratio(process)
            fields["equal"] = equal_share(result.capcli.rounds[-1], process.rounds[-1])
        processes[process.name] = fields
    found: dict[str, Any] = {"images": result.images, "contestants": processes}
    if (profile := result.profile) is not None:
        found |= {"dtype": profile.dtype, "stages": asdict(profile.stages), "ceiling": profile.ceiling}
        found |= {
            "rates": asdict(profile.rates) if profile.rates else None,
            "work": asdict(profile.cost) if profile.cost else None,
        }
    return found
