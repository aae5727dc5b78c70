"""What `capcli bench` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from capcli.errors import UsageError
from capcli.options.caption import DEFAULT_MODEL, GenerationOptions

PEERS = ("single", "batched", "bfloat16", "compiled", "optimum")
LEAST_ROUNDS = 5  # of which a median is told


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Caption `photos` with `model`, again and again, beside each of `against`, and say where the time goes.

    Every contestant has a process of its own, and they take turns for `rounds` rounds. `peer_python` is the interpreter that
    peers run with (None: this one), such as one where Optimum is installed. `batch_size` and `threads` None: what pays.
    `at_least` is how many times as fast as every peer it must be; `limit` takes so many photos only. `quick` measures
    neither stages nor peak rates. `gpu_decode` is what it is to `capcli caption`; stages are as without it.
    """

    photos: tuple[str, ...]
    model: str = DEFAULT_MODEL
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    threads: int | None = None
    limit: int | None = None
    gpu_decode: bool = False
    against: tuple[str, ...] = ()
    peer_python: str | None = None
    rounds: int = LEAST_ROUNDS
    at_least: float | None = None
    quick: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        for name in self.against:
            if name not in PEERS:
                raise UsageError(f"--against {name}: it is {', '.join(PEERS)}")
        if len(set(self.against)) < len(self.against):
            raise UsageError("--against names a peer twice")
        if self.at_least is not None and not self.against:
            raise UsageError("--at-least compares with a peer: give --against")
        if self.generation.do_sample and self.against:
            raise UsageError("captions drawn at random cannot be held against a peer's: leave --do-sample out")
