"""The two callbacks of the Trainer: one schedules reports, evaluations and checkpoints, the other records and shows them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from capcli.errors import CapcliError
from capcli.imports import cause, explain_import, is_missing
from capcli.options import TrainOptions
from capcli.progress import warn
from capcli.storage import atomic
from capcli.text import printable
from capcli.training.loop.freezing import Frozen, unfreeze
from capcli.training.output.checkpoints import Select, best, prune, ranking
from capcli.training.output.events import EventFile
from capcli.training.output.folder import CURVES
from capcli.training.output.history import History, Point
from capcli.training.output.live_view import LiveView, Sample

Every = int | str


class ScheduleCallback(TrainerCallback):
    """Decides by the options when to report, evaluate, save, unfreeze and stop, in place of transformers' own callback.

    The last step is always reported, evaluated and saved. `freeze` freezes a model by the options. `stop` returns whether
    the run should end; if it does in any process, all processes save and end at the same step, and `interrupted` is set.
    `write_line` shows a line to the user.
    """

    def __init__(
        self,
        options: TrainOptions,
        freeze: Callable[[Any], Frozen],
        *,
        validates: bool,
        stop: Callable[[], bool],
        write_line: Callable[[str], None],
    ) -> None:
        self._options, self._freeze, self._validates = options, freeze, validates
        self._stop, self._write_line = stop, write_line
        self._frozen = False
        self._evaluate: Every = options.evaluate_every
        self._save: Every = options.save_every or options.evaluate_every
        self.interrupted = False

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> TrainerControl:
        """Freezes a part that is unfrozen later only now, because the optimizer and DDP cannot add its weights later."""
        if self._options.unfreeze_after is not None:
            self._frozen = True
            self._write_line(self._freeze(objects["model"]).line())
            self._unfreeze_if_due(state, objects["model"])
        return control

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **objects: Any,
    ) -> TrainerControl:
        self._unfreeze_if_due(state, objects["model"])
        return control

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        evaluation = is_due(self._evaluate, state) or last
        control.should_evaluate = self._validates and evaluation
        control.should_log = state.global_step % self._options.log_every == 0 or control.should_evaluate or last
        control.should_save = evaluation or is_due(self._save, state)
        if last:
            control.should_training_stop = True
        elif self._stop_requested(args):
            self.interrupted = control.should_training_stop = control.should_save = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        patience = self._options.patience
        if patience is not None and state.global_step < state.max_steps:
            worse = evaluations_since_best(state, self._options)
            if worse >= patience:
                self._write_line(f"no improvement for {worse} evaluations: stopping early, at step {state.global_step}")
                control.should_training_stop = control.should_save = True
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        if state.is_world_process_zero:
            folder = str(args.output_dir)
            keep = best(folder, ranking(state.log_history, self._options.select), self._options.keep_best)
            try:
                prune(folder, state.global_step, keep)
            except OSError as error:
                raise CapcliError(
                    f"old checkpoints in {printable(folder)} cannot be deleted: {error.strerror or error}; --resume "
                    "continues from the last one"
                ) from error
        return control

    def _unfreeze_if_due(self, state: TrainerState, model: Any) -> None:
        after = self._options.unfreeze_after
        if self._frozen and after is not None and state.global_step >= after:
            self._frozen = False
            self._write_line(f"step {state.global_step}: {unfreeze(model).line()}")

    def _stop_requested(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self._stop()
        stop = torch.tensor(float(self._stop()), device=args.device)
        torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
        return bool(stop.item())


class ReportCallback(TrainerCallback):
    """Records the log of the main process in history.csv, curves.png (in `folder`) and TensorBoard, and shows it.

    `samples` returns the sample captions of the latest evaluation.
    """

    def __init__(
        self,
        view: LiveView,
        history: History,
        events: EventFile,
        folder: str,
        select: Select,
        samples: Callable[[], Sequence[Sample]],
    ) -> None:
        self._view, self._history, self._events, self._samples = view, history, events, samples
        self._folder, self._select = folder, select
        self._undrawn = False  # points since curves.png was written
        self._warnings: set[str] = set()

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
        self._undrawn = True
        for name, value in entry.items():
            if self._events and isinstance(value, int | float) and name not in ("step", "epoch"):
                group = "validation" if name.startswith("eval_") else "training"
                self._events.add_scalar(f"{group}/{name.removeprefix('eval_')}", value, state.global_step)
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
        ranks = [rank for _, rank in ranking(state.log_history, self._select)]
        is_best = bool(ranks) and ranks.index(max(ranks)) == len(ranks) - 1
        samples = self._samples()
        for number, sample in enumerate(samples):
            self._events.add_text(f"captions/{number}", f"{sample.name}: {sample.caption}", state.global_step)
        self._view.evaluated(point, samples, self._select if is_best else None)
        self._draw()

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            self._draw()

    def _draw(self) -> None:
        if self._undrawn:
            self._undrawn = False
            warning = draw_curves(self._folder, self._history.points)
            if warning and warning not in self._warnings:
                self._warnings.add(warning)
                warn(warning)


def draw_curves(folder: str, points: Sequence[Point]) -> str | None:
    """Writes curves.png if there is something to draw. Returns a warning instead of raising: the training continues."""
    try:
        from capcli.training.output.curves import curves_png

        image = curves_png(points)
        if image:
            atomic.replace(os.path.join(folder, CURVES), [image])
    except Exception as error:  # whatever a drawing library raises
        if is_missing(error, "matplotlib"):
            return f"{CURVES} is not drawn, matplotlib is missing: pip install 'capcli[train]'"
        return f"{CURVES} is not drawn: {explain_import(error) or cause(error)}"
    return None


def point_of(entry: dict[str, Any]) -> Point | None:
    """An entry of the Trainer's log as a point of the history; None for the summary at the end of the training."""
    if "loss" not in entry and "eval_loss" not in entry:
        return None
    known = {name: entry[name] for name in ("loss", "learning_rate", "grad_norm", "images_per_second") if name in entry}
    scores = {
        name.removeprefix("eval_"): value
        for name, value in entry.items()
        if name.startswith("eval_") and name != "eval_loss"
    }
    return Point(entry["step"], entry["epoch"], val_loss=entry.get("eval_loss"), scores=scores, **known)


def state_at(checkpoint: str) -> TrainerState:
    """The Trainer's state in a checkpoint. Raises CapcliError for a file that is damaged or missing."""
    path = os.path.join(checkpoint, TRAINER_STATE_NAME)
    try:
        state: TrainerState = TrainerState.load_from_json(path)
        [point_of(entry) for entry in state.log_history]
        if type(state.global_step) is not int:
            raise TypeError("global_step is not a number")
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CapcliError(
            f"{path} is damaged ({cause(error)}): move {checkpoint} away, and --resume continues from the checkpoint before"
        ) from error
    return state


def evaluations_since_best(state: TrainerState, options: TrainOptions) -> int:
    """The number of evaluations after the best one."""
    ranks = [rank for _, rank in ranking(state.log_history, options.select)]
    return len(ranks) - 1 - ranks.index(max(ranks)) if ranks else 0


def is_finished(state: TrainerState, options: TrainOptions, steps: int) -> bool:
    """Whether a run of `steps` steps is complete in this state."""
    stopped = options.patience is not None and evaluations_since_best(state, options) >= options.patience
    return state.global_step >= steps or stopped


def is_due(every: Every, state: TrainerState) -> bool:
    """Whether an event that occurs every `every` steps, or at the end of each epoch, is due."""
    if isinstance(every, int):
        return state.global_step % every == 0
    return float(state.epoch or 0.0).is_integer()
