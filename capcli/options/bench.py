"""Options of `capcli bench`."""

from __future__ import annotations

from dataclasses import dataclass, field

from capcli.errors import UsageError
from capcli.options.caption import DEFAULT_MODEL, Dtype, GenerationOptions, check_device
from capcli.options.limits import NonNegativeFloat, PositiveInt, check_limits

BASELINES = ("single", "batched", "bfloat16", "compiled", "optimum")


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Measure how fast `model` captions `photos`, and compare it with the baselines `against`.

    capcli and each baseline run in processes of their own and take turns for `rounds` rounds. `peer_python` is the Python
    interpreter of the baselines (None: this one), for example one of an environment with Optimum. `batch_size` and
    `threads` None: chosen automatically. `limit` takes only the first images. `at_least` is the speedup over every
    baseline below which the command fails. `quick` skips the stages and the peak rates of the machine. `gpu_decode` has the
    meaning that it has in `capcli caption`; the stages are measured without it.
    """

    photos: tuple[str, ...]
    model: str = DEFAULT_MODEL
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    device: str = "auto"
    dtype: Dtype = "auto"
    batch_size: PositiveInt | None = None
    threads: PositiveInt | None = None
    limit: PositiveInt | None = None
    gpu_decode: bool = False
    against: tuple[str, ...] = ()
    peer_python: str | None = None
    rounds: PositiveInt = 5
    at_least: NonNegativeFloat | None = None
    quick: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        check_device(self.device)
        for name in self.against:
            if name not in BASELINES:
                raise UsageError(f"--against {name}: it must be one of {', '.join(BASELINES)}")
        if len(set(self.against)) < len(self.against):
            raise UsageError("--against names a baseline twice")
        if self.at_least is not None and not self.against:
            raise UsageError("--at-least compares with baselines: name them with --against")
        if self.generation.do_sample and self.against:
            raise UsageError("sampled captions cannot be compared with those of a baseline: leave --do-sample out")
