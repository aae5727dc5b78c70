"""How long a training run will still take: its steps at their recent pace, and the evaluations to come."""

from __future__ import annotations

from collections import deque

MARKS = 100  # of the recent past: the pace is theirs
MARK_EVERY = 1.0  # seconds at least between two


class TimeLeft:
    """Told of steps and evaluations with the seconds of one clock, it estimates what is left.

    Evaluations are pauses in the steps' time. They are taken to come again at the distance of the last two, and to take
    as long as they did on average; before the first nothing is known of them.
    """

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._total, self._step = total_steps, first_step
        self._marks: deque[tuple[float, int]] = deque(maxlen=MARKS)  # training seconds, without pauses, and steps
        self._paused = 0.0
        self._pauses = 0
        self._began: float | None = None  # the evaluation under way
        self._evaluated_at, self._distance = first_step, 0

    def step(self, step: int, now: float) -> None:
        """A step is done."""
        self.resume(now)
        self._step = step
        trained = now - self._paused
        if not self._marks or trained - self._marks[-1][0] >= MARK_EVERY:
            self._marks.append((trained, step))

    def pause(self, now: float) -> None:
        """An evaluation begins, or is still under way."""
        if self._began is None:
            self._began = now

    def resume(self, now: float) -> None:
        """The evaluation, where there was one, is over."""
        if self._began is None:
            return
        self._paused += now - self._began
        self._pauses += 1
        self._began = None
        if self._step > self._evaluated_at:
            self._distance, self._evaluated_at = self._step - self._evaluated_at, self._step

    def left(self, now: float) -> float | None:
        """Seconds until the last step and its evaluation; None while nobody can tell."""
        if self._step >= self._total:
            return None if self._began is not None and not self._pauses else self._evaluating(now)
        if len(self._marks) < 2 or self._marks[-1][1] <= self._marks[0][1]:
            return None
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        each = (ended - began) / (last - first)
        trained = (self._began if self._began is not None else now) - self._paused
        training = max(0.0, each * (self._total - last) - (trained - ended))
        return training + self._evaluating(now)

    def _evaluating(self, now: float) -> float:
        if not self._pauses:
            return 0.0
        mean = self._paused / self._pauses
        under_way = 0.0 if self._began is None else max(0.0, mean - (now - self._began))
        at = self._evaluated_at if self._began is None else self._step
        to_come = -(-(self._total - at) // self._distance) if self._distance else 0
        return under_way + mean * to_come
