"""The main function of `capcli train`: data -> captioner -> training -> the best model in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from capcli.errors import CapcliError
from capcli.interrupts import Interrupts
from capcli.models.checkpoint import quiet_transformers
from capcli.options import TrainOptions
from capcli.text import counted
from capcli.training.best_model import save_best_model
from capcli.training.data.dataset import (
    Facts,
    LostImages,
    TrainingData,
    read_data,
    refuse_unvalidated,
    validation_flags,
)
from capcli.training.data.mixing import TaskMixture, shares
from capcli.training.data.pairs import Pairs
from capcli.training.loop.arguments import total_steps, training_arguments
from capcli.training.loop.callbacks import ReportCallback, ScheduleCallback, is_finished, point_of, state_at
from capcli.training.loop.freezing import Frozen, freeze, refuse_freezing
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.model.pretrained import KINDS, refuse_configs
from capcli.training.output.events import EventFile
from capcli.training.output.folder import EVENTS, LEFT_OUT, RunFolder
from capcli.training.output.history import History
from capcli.training.output.live_view import LiveView, Sample
from capcli.training.setup import Assembled, assemble_captioner, make_trainer, refuse_unread_tags

LAUNCHER_GRACE = 5.0  # seconds in which torchrun passes on a signal that the terminal has sent to all processes
SAMPLES = 3  # validation images whose captions are shown at each evaluation


def run(options: TrainOptions, folder: RunFolder) -> int:
    """Trains a captioner in a folder that `RunFolder.open` has checked, or resumes the run in it. Returns the exit code.

    Raises UsageError for options that do not go together, before a model is loaded, and CapcliError when the run fails.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    arguments = training_arguments(options, folder.checkpoints)
    main = arguments.process_index == 0
    quiet = options.quiet or not main
    with quiet_transformers():
        if folder.checkpoint is None:
            refuse_configs({role: getattr(options.model, role.replace("-", "_")) for role in KINDS})
            refuse_unread_tags(options, quiet=quiet)
        data, facts = read_data(options, folder, arguments)
        refuse_unvalidated(options, data)
        captioner = assemble_captioner(options, folder.checkpoint, data, quiet=quiet)
        options = replace(options, model=replace(options.model, max_length=captioner.max_length))
        new = new_parts(options, folder, facts, captioner)
        freeze_part = freezer(options, new)
        frozen = freeze_part(captioner.model) if options.unfreeze_after is None and not options.lora else None
        if main:
            folder.make()
        trainer = make_trainer(options, arguments, captioner, data)
        steps = total_steps(arguments, len(trainer.pairs))
        state = state_at(folder.checkpoint) if folder.checkpoint else None
        first_step = state.global_step if state else 0
        finished = state is not None and is_finished(state, options, steps)
        if main and not finished:  # resuming a finished run changes none of its files
            folder.begin(options, {**facts, "new": sorted(new)})
            trainer.run = folder.facts().get("run")
            if folder.checkpoint is None:
                with folder.writing():
                    data.report.write(folder.path(LEFT_OUT))
        signals = Interrupts(quiet=quiet, grace=LAUNCHER_GRACE if arguments.world_size > 1 else 0.0)
        with signals as interrupts, LiveView(steps, first_step=first_step, quiet=quiet) as view:
            describe(options, view, captioner, data, trainer, frozen)
            for line in folder.passed_over:
                view.write_line(f"passed over {line}")
            schedule = ScheduleCallback(
                options, freeze_part, validates=bool(data.val), stop=interrupts.asked, write_line=view.write_line
            )
            trainer.add_callback(schedule)
            if main:
                trainer.add_callback(report_callback(trainer, options, folder, data, view))
            if state is not None and finished:
                trainer.state, options = state, replace(options, select=folder.settings()["select"])
                view.write_line(f"the run is finished, at step {first_step:,}: its settings are not changed")
            else:
                if main and state is not None and state.max_steps != steps:
                    move_end(folder, first_step, state.max_steps, steps, view)
                train(trainer, folder.checkpoint, view)
            if main:
                best = save_best_model(options, folder, captioner, data, trainer)
                view.write_line(f"interrupted; --resume continues. So far: {best}" if schedule.interrupted else best)
        trainer.accelerator.wait_for_everyone()
    return interrupts.exit_code if schedule.interrupted else 0


def train(trainer: CaptionTrainer, checkpoint: str | None, view: LiveView) -> None:
    """Runs the training loop. Raises CapcliError if a DataLoader worker was killed, and what the Trainer raises."""
    if checkpoint is not None:
        trainer.restore_meter(checkpoint)
        view.write_line(f"resuming from {os.path.basename(checkpoint)}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip(" .")
        raise CapcliError(
            f"a process that loads images was killed, probably because memory ran out ({reason}): give fewer --workers, "
            "or --workers 0; --resume continues from the last checkpoint"
        ) from error


def move_end(folder: RunFolder, step: int, before: int, after: int, view: LiveView) -> None:
    """Shows, and records for the model card, that a resumed run ends at another step than before."""
    earlier = [move for move in folder.facts().get("moved", ()) if move[0] < step]
    folder.add_facts(moved=[*earlier, [step, before, after]])
    view.write_line(f"from step {step:,} the schedule ends at step {after:,} instead of {before:,}")


def new_parts(options: TrainOptions, folder: RunFolder, facts: Facts, captioner: Assembled) -> frozenset[str]:
    """The parts that had random weights when the run began, which freezing leaves trainable.

    For a resumed run they are read from run.json: a checkpoint does not record them.
    """
    if folder.checkpoint is not None:
        return frozenset(facts["new"])
    if options.unfreeze_after is None:
        refuse_freezing(options.freeze, captioner.new)
    return captioner.new


def freezer(options: TrainOptions, new: frozenset[str]) -> Callable[[Any], Frozen]:
    """A function that freezes a model by the options; the new parts of a frozen decoder stay trainable."""
    return partial(
        freeze,
        what=options.freeze,
        new_cross_attention=bool(new & {"decoder", "cross-attention"}),
        new_embeddings=bool(new & {"decoder", "embeddings"}),
    )


def describe(
    options: TrainOptions,
    view: LiveView,
    captioner: Assembled,
    data: TrainingData,
    trainer: CaptionTrainer,
    frozen: Frozen | None,
) -> None:
    """Shows data, special tokens and warnings before the training starts."""
    images = f"{counted(len(data.train), 'image')} to train on, {len(data.val):,} to validate"
    view.write_line(f"{data.report.line()}; {images}")
    for note in data.report.notes:
        view.write_line(note)
    view.write_line(captioner.specials.line(captioner.tokenizer))
    for note in captioner.notes:
        view.write_line(note)
    if frozen:
        view.write_line(frozen.line())
    if cut := trainer.pairs.count_truncated(captioner.specials.end):
        texts = counted(cut, "answer" if options.task else "caption")
        longer = "is longer" if cut == 1 else "are longer"
        view.write_line(
            f"{texts} {longer} than --max-length ({captioner.max_length} tokens): truncated, without the end token"
        )
    for line in tasks_never_drawn(options, trainer.pairs):
        view.write_line(line)
    if not data.val:
        view.write_line(
            f"no validation images (give {validation_flags(options)}): the last checkpoint counts as the best"
        )
    if torch.cuda.is_available() and (count := torch.cuda.device_count()) > trainer.args.world_size:
        used = f"{trainer.args.world_size} of {count} GPUs in use"
        view.write_line(f"{used}; to use all: torchrun --nproc-per-node gpu -m capcli train ...")


def tasks_never_drawn(options: TrainOptions, pairs: Pairs | TaskMixture) -> Iterator[str]:
    """A line for each task whose weight is too small to be drawn in an epoch."""
    if isinstance(pairs, TaskMixture):
        counts = shares(len(pairs), pairs.weights)
        for name in (task.name for task, count in zip(options.task, counts, strict=True) if not count):
            yield f"task {name} is drawn 0 times in an epoch of {len(pairs):,} pairs: give it more weight"


def report_callback(
    trainer: CaptionTrainer, options: TrainOptions, folder: RunFolder, data: TrainingData, view: LiveView
) -> ReportCallback:
    """The callback that records the run, after what was recorded up to the checkpoint of a resumed run."""
    log = state_at(folder.checkpoint).log_history if folder.checkpoint else []
    points = [point for entry in log if (point := point_of(entry)) is not None]
    last = points[-1].step if points else 0
    events = EventFile(folder.path(EVENTS), after=last or None)
    trainer.evaluating, trainer.failed = view.evaluating, LostImages(folder, data.report, view.write_line)

    def samples() -> Sequence[Sample]:
        first = trainer.validation.samples(trainer.captions, SAMPLES) if trainer.validation else ()
        return [Sample(*sample) for sample in first]

    return ReportCallback(view, History(folder.folder, points), events, folder.folder, options.select, samples)
