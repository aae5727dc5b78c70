"""What a run shows of itself while it lasts: every report goes to the view, to history.csv and to TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from capcli.training.output.checkpoints import Select, ranking
from capcli.training.output.history import History, Point
from capcli.training.output.view import Sample, View


def point_of(entry: dict[str, Any]) -> Point | None:
    """An entry of the Trainer's log as a point of the history; None for its closing summary."""
    if "loss" not in entry and "eval_loss" not in entry:
        return None
    known = {name: entry[name] for name in ("loss", "learning_rate", "grad_norm", "images_per_second") if name in entry}
    scores = {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and name != "eval_loss"
    }
    return Point(entry["step"], entry["epoch"], val_loss=entry.get("eval_loss"), scores=scores, **known)


def earlier_points(checkpoint: str | None) -> list[Point]:
    """What had been reported when a checkpoint was written."""
    log = state_at(checkpoint).log_history if checkpoint else []
    return [point for entry in log if (point := point_of(entry)) is not None]


def state_at(checkpoint: str) -> TrainerState:
    """Where a run stood when a checkpoint was written."""
    state: TrainerState = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
    return state


class ReportCallback(TrainerCallback):
    """Shows what the main process logs. `samples` gives what to show at an evaluation; `events` is TensorBoard's writer."""

    def __init__(
        self, view: View, history: History, events: Any, select: Select, samples: Callable[[], Sequence[Sample]]
    ) -> None:
        self._view, self._history, self._events, self._select, self._samples = view, history, events, select, samples

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        entry = state.log_history[-1]
        point = point_of(entry)
        if point is None or not state.is_world_process_zero:
            return
        self._history.add(point)
        for name, value in entry.items():
            if isinstance(value, int | float) and name not in ("step", "epoch"):
                place = "validation" if name.startswith("eval_") else "training"
                self._events.add_scalar(f"{place}/{name.removeprefix('eval_')}", value, state.global_step)
        if point.loss is not None:
            self._view.step(point)

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        point = point_of(state.log_history[-1])
        assert point is not None
        merits = [merit for _, merit in ranking(state.log_history, self._select)]
        best = bool(merits) and merits.index(max(merits)) == len(merits) - 1
        samples = self._samples()
        for number, sample in enumerate(samples):
            self._events.add_text(f"captions/{number}", f"{sample.name}: {sample.caption}", state.global_step)
        self._view.evaluated(point, samples, best)
        self._history.draw()

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._history.draw()
            self._events.close()
