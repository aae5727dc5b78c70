"""When a training run reports, evaluates, saves, unfreezes and stops: what its options say, as one callback of the Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from capcli.options import TrainOptions
from capcli.training.loop.freezing import Frozen, unfreeze
from capcli.training.output.checkpoints import best, prune, ranking

Every = int | str


class ScheduleCallback(TrainerCallback):
    """Takes the place of transformers' own flow. The last step always ends reported, evaluated and saved.

    `hold` freezes what the options want frozen. `stop` says whether somebody asked the run to end; any process may hear it,
    and all of them end at the same step, saved. `say` tells people.
    """

    def __init__(
        self,
        options: TrainOptions,
        hold: Callable[[Any], Frozen],
        *,
        validates: bool,
        stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._options, self._hold, self._validates, self._stop, self._say = options, hold, validates, stop, say
        self._frozen = False
        self._evaluate: Every = options.evaluate_every
        self._save: Every = options.save_every or options.evaluate_every
        self.interrupted = False
        self.stopped_early = False

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> TrainerControl:
        """What thaws later freezes here, when the optimizer and DDP know of it; they would not learn of it later."""
        if self._options.unfreeze_after is not None:
            self._frozen = True
            self._say(self._hold(given["model"]).line())
            self._thaw(state, given["model"])
        return control

    def on_step_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> TrainerControl:
        self._thaw(state, given["model"])
        return control

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        last = state.global_step >= state.max_steps
        evaluation = _due(self._evaluate, state) or last
        control.should_evaluate = self._validates and evaluation
        control.should_log = state.global_step % self._options.log_every == 0 or control.should_evaluate or last
        control.should_save = evaluation or _due(self._save, state)
        if last:
            control.should_training_stop = True
        elif self._asked_to_stop(args):
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
            worse = no_better(state, self._options)
            if worse >= patience:
                self._say(f"no better for {worse} evaluations: stopping early, at step {state.global_step}")
                self.stopped_early = control.should_training_stop = control.should_save = True
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
            prune(folder, best(folder, ranking(state.log_history, self._options.select), self._options.keep_best))
        return control

    def _thaw(self, state: TrainerState, model: Any) -> None:
        after = self._options.unfreeze_after
        if self._frozen and after is not None and state.global_step >= after:
            self._frozen = False
            self._say(f"step {state.global_step}: {unfreeze(model).line()}")

    def _asked_to_stop(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self._stop()
        asked = torch.tensor(float(self._stop()), device=args.device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        return bool(asked.item())


def no_better(state: TrainerState, options: TrainOptions) -> int:
    """For how many evaluations there has been no better one."""
    values = [value for _, value in ranking(state.log_history, options.select)]
    return len(values) - 1 - values.index(max(values)) if values else 0


def finished(state: TrainerState, options: TrainOptions, steps: int) -> bool:
    """Whether a run of `steps` that stands there has nothing left to do."""
    patient = options.patience is None or no_better(state, options) < options.patience
    return state.global_step >= steps or not patient


def _due(every: Every, state: TrainerState) -> bool:
    if isinstance(every, int):
        return state.global_step % every == 0
    return float(state.epoch or 0.0).is_integer()
