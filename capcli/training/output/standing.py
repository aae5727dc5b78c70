"""Where a training run stands, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from capcli.progress import duration
from capcli.training.output.history import Point
from capcli.training.output.trail import Sparkline

TOLD = ("_accuracy", "_restored", "_CIDEr")  # of what several tasks measure


@dataclass(slots=True)
class TrainingState:
    """The latest of everything that a run has told of itself."""

    total: int
    step: int
    epoch: float | None = None
    loss: float | None = None
    rate: float | None = None
    val_loss: float | None = None
    cider: float | None = None
    best: int | None = None  # the step of the best evaluation
    evaluating: tuple[int, int] | None = None  # images done, of how many
    left: float | None = None  # seconds
    losses: Sparkline = field(default_factory=Sparkline)

    def heed(self, point: Point) -> None:
        self.step, self.epoch = point.step, point.epoch
        if point.loss is not None:
            self.loss = point.loss
            self.losses.add(point.loss)
        self.rate = self.rate if point.images_per_second is None else point.images_per_second
        self.val_loss = self.val_loss if point.val_loss is None else point.val_loss
        self.cider = point.scores.get("CIDEr", self.cider)


def progress_line(now: TrainingState) -> str:
    """Where the run stands, for a log."""
    facts = [] if now.loss is None else [f"loss {figure(now.loss)}"]
    return f"step {now.step}/{now.total}: {', '.join([*facts, *speed(now)]) or 'under way'}"


def evaluation_line(now: TrainingState, point: Point, best: bool) -> str:
    """What an evaluation measured."""
    facts = [] if now.loss is None else [f"loss {figure(now.loss)}"]
    measured = [] if point.val_loss is None else [f"validation loss {figure(point.val_loss)}"]
    if "CIDEr" in point.scores:
        measured.append(f"CIDEr {point.scores['CIDEr']:.3f}")
    measured += [f"{name} {value:.3f}" for name, value in point.scores.items() if name.endswith(TOLD)]
    if best:
        measured[-1:] = [f"{measured[-1]} (best so far)"] if measured else ["best so far"]
    return f"step {point.step}/{now.total}: {', '.join([*facts, *measured]) or 'evaluated'}"


def speed(now: TrainingState) -> list[str]:
    """Images per second and the time left, where they are known."""
    rate = [] if now.rate is None else [f"{per_second(now.rate)} images/s"]
    left = [] if now.left is None or now.step >= now.total else [f"{duration(now.left)} left"]
    return [*rate, *left]


def figure(value: float) -> str:
    """A loss in as many digits as say something."""
    if abs(value) >= 1e4 or 0 < abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def per_second(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
