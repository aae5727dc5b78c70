"""`capcli train` on one page: data -> captioner -> training -> the folder it leaves."""

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
from capcli.training.loop.callbacks import ScheduleCallback, finished
from capcli.training.loop.freezing import Frozen, freeze, refuse_freezing
from capcli.training.loop.reporting import ReportCallback, earlier_points, state_at
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.model.pretrained import KINDS, refuse_configs
from capcli.training.outcome import leave_captioner
from capcli.training.output.folder import EVENTS, LEFT_OUT, RunFolder
from capcli.training.output.history import History
from capcli.training.output.view import Sample, View
from capcli.training.setup import assemble_captioner, make_trainer, refuse_unread_tags

LAUNCHER = 5.0  # seconds in which torchrun passes on the signal that a terminal has already sent
SHOWN = 3  # validation images whose captions are shown at each evaluation


def run(options: TrainOptions, place: RunFolder) -> int:
    """Train a captioner in a folder that was opened for it, or go on with the one there; the exit code.

    Raises UsageError for what cannot be meant, before a model is loaded, and CapcliError when the run cannot be done.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    arguments = training_arguments(options, place.checkpoints)
    main = arguments.process_index == 0
    with quiet_transformers():
        if place.checkpoint is None:
            refuse_configs({role: getattr(options.model, role.replace("-", "_")) for role in KINDS})
            refuse_unread_tags(options, quiet=options.quiet or not main)
        data, facts = read_data(options, place, arguments)
        refuse_unvalidated(options, data)
        made = assemble_captioner(options, place.checkpoint, data, quiet=options.quiet or not main)
        options = replace(options, model=replace(options.model, max_length=made.max_length))
        new = pinned_new(options, place, facts, made)
        hold = freezer(options, new)
        frozen = hold(made.model) if options.unfreeze_after is None else None
        if main:
            place.make()
        trainer = make_trainer(options, arguments, made, data)
        steps = total_steps(arguments, len(trainer.pairs))
        stood = state_at(place.checkpoint) if place.checkpoint else None
        over = stood is not None and finished(stood, options, steps)
        if main and not over:  # of a finished run nothing is changed
            place.begin(options, {**facts, "new": sorted(new)})
            if place.checkpoint is None:
                data.report.write(place.path(LEFT_OUT))
        spare = Interrupts(quiet=options.quiet or not main, grace=LAUNCHER if arguments.world_size > 1 else 0.0)
        with spare as interrupts, View(steps, quiet=options.quiet or not main) as view:
            describe(options, view, made, data, trainer, frozen)
            flow = ScheduleCallback(options, hold, validates=bool(data.val), stop=interrupts.asked, say=view.say)
            trainer.add_callback(flow)
            if main:
                trainer.add_callback(show(trainer, options, place, data, view))
            if stood is not None and over:
                trainer.state, options = stood, replace(options, select=place.settings()["select"])
                view.say(f"the run is finished, at step {stood.global_step:,}: its settings stay as they were")
            else:
                if main and stood is not None and stood.max_steps != steps:
                    move_end(place, stood.global_step, stood.max_steps, steps, view)
                learn(trainer, place.checkpoint, view)
            if main:
                result = leave_captioner(options, place, made, data, trainer)
                view.say(f"interrupted; --resume goes on. So far {result}" if flow.interrupted else result)
        trainer.accelerator.wait_for_everyone()
    return interrupts.exit_code if flow.interrupted else 0


def learn(trainer: CaptionTrainer, checkpoint: str | None, view: View) -> None:
    """Raises CapcliError where a process that loads images was ended from outside, besides all that training raises."""
    if checkpoint is not None:
        trainer.take_up(checkpoint)
        view.say(f"going on from {os.path.basename(checkpoint)}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # which says it wherever the main process was
            raise
        reason = str(error).strip(" .")
        raise CapcliError(
            f"a process that loads images was ended from outside, most often for want of memory ({reason}): give fewer "
            "--workers, or --workers 0; --resume goes on from the last checkpoint"
        ) from error


def move_end(place: RunFolder, step: int, before: int, after: int, view: View) -> None:
    """Tells people, and keeps for the card, that a run goes on to another end than it went for."""
    earlier = [each for each in place.recall().get("moved", ()) if each[0] < step]
    place.remember(moved=[*earlier, [step, before, after]])
    view.say(f"from step {step:,} on the schedule runs to step {after:,}, no longer to {before:,}")


def pinned_new(options: TrainOptions, place: RunFolder, facts: Facts, made: AssembledCaptioner) -> frozenset[str]:
    """Which parts had random weights when the run began: a checkpoint no longer tells, and freezing leaves them out."""
    if place.checkpoint is not None:
        return frozenset(facts["new"])
    if options.unfreeze_after is None:
        refuse_freezing(options.freeze, made.new)
    return made.new


def freezer(options: TrainOptions, new: frozenset[str]) -> Callable[[Any], Frozen]:
    """Freezes a model as the options say; of a decoder, what is new learns all the same."""
    return partial(
        freeze,
        what=options.freeze,
        new_cross_attention=bool(new & {"decoder", "cross-attention"}),
        new_embeddings=bool(new & {"decoder", "embeddings"}),
    )


def describe(
    options: TrainOptions,
    view: View,
    made: AssembledCaptioner,
    data: TrainingData,
    trainer: CaptionTrainer,
    frozen: Frozen | None,
) -> None:
    """What is about to learn from what."""
    view.say(f"{data.report.line()}; {counted(len(data.train), 'image')} to train on, {len(data.val):,} to validate")
    for note in data.report.notes:
        view.say(note)
    view.say(made.specials.line(made.tokenizer))
    for note in made.notes:
        view.say(note)
    if frozen:
        view.say(frozen.line())
    if cut := trainer.pairs.count_truncated(made.specials.end):
        what = counted(cut, "answer" if options.task else "caption")
        longer = "is longer" if cut == 1 else "are longer"
        view.say(f"{what} {longer} than {made.max_length} tokens and cut (--max-length): cut ones teach no end")
    for line in never_drawn(options, trainer.pairs):
        view.say(line)
    if not data.val:
        view.say(f"nothing validates (give {validation_flags(options)}): the last checkpoint is taken for the best")
    if torch.cuda.is_available() and (count := torch.cuda.device_count()) > trainer.args.world_size:
        view.say(
            f"{trainer.args.world_size} of {count} GPUs in use; all: torchrun --nproc-per-node gpu -m capcli train ..."
        )


def never_drawn(options: TrainOptions, pairs: Pairs | TaskMixture) -> Iterator[str]:
    """A line on each task whose weight is too small for a single draw."""
    if isinstance(pairs, TaskMixture):
        counts = shares(len(pairs), pairs.weights)
        for name in (task.name for task, count in zip(options.task, counts, strict=True) if not count):
            yield f"task {name} is drawn 0 times in an epoch of {len(pairs):,} pairs: give it more weight"


def show(
    trainer: CaptionTrainer, options: TrainOptions, place: RunFolder, data: TrainingData, view: View
) -> ReportCallback:
    """Reports go to the view, history.csv, curves.png and TensorBoard; a run that goes on keeps what it had reported."""
    from torch.utils.tensorboard import SummaryWriter

    points = earlier_points(place.checkpoint)
    reached = points[-1].step if points else 0
    events = SummaryWriter(place.path(EVENTS), purge_step=reached + 1 if reached else None)
    trainer.evaluating, trainer.failed = view.evaluating, LostImages(place, data.report, view.say)

    def samples() -> Sequence[Sample]:
        shown = trainer.validation.samples(trainer.captions, SHOWN) if trainer.validation else ()
        return [Sample(*each) for each in shown]

    return ReportCallback(view, History(place.folder, points), events, options.select, samples)
