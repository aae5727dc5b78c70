"""transformers' Seq2SeqTrainer, with the loss, the pixels, the validation and the checkpoints of a captioner."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from capcli.errors import CapcliError
from capcli.models.families import family_of
from capcli.options import TrainOptions
from capcli.records import Failure
from capcli.storage import atomic
from capcli.text import counted, printable
from capcli.training.data.mixing import TaskMixture, TaskSampler
from capcli.training.data.pairs import Collate, Pairs
from capcli.training.loop import freezing
from capcli.training.loop.loss import token_loss
from capcli.training.loop.patches import hide_patches, patch_size
from capcli.training.loop.task_validation import Validations
from capcli.training.loop.validation import Validation, captioner_of
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.output.checkpoints import MARK
from capcli.training.output.save import save_captioner


@dataclass
class Meter:
    """What happened since the last report: the summed loss of updates, images learnt from, lost ones, and seconds."""

    since: int = 0  # the step of the last report
    loss: Tensor | float = 0.0  # of this process
    images: int = 0
    lost: list[Failure] = field(default_factory=list)
    waited: float = 0.0  # seconds in which the next batch was not there yet
    began: float | None = None  # None: it has not
    paused: float = 0.0  # seconds that were not training

    def reset(self, step: int, loss: float = 0.0) -> None:
        self.since, self.loss, self.images, self.lost = step, loss, 0, []
        self.waited, self.began, self.paused = 0.0, None, 0.0

    def pause(self, seconds: float) -> None:
        """Seconds just gone by were not training; before the first batch they count for nothing anyway."""
        if self.began is not None:
            self.paused += seconds

    @property
    def seconds(self) -> float:
        """Of training."""
        return 1e-9 if self.began is None else max(time.monotonic() - self.began - self.paused, 1e-9)


class CaptionTrainer(Seq2SeqTrainer):
    """Trains `made.model` on `train`. The loss is `token_loss`; `validation` None evaluates nothing.

    An image that can no longer be loaded teaches nothing; with each report every process hears of it through `failed`.
    Raises CapcliError, in every process, when no image since the last report could be loaded, when the loss is no number,
    and for a checkpoint that cannot be written.

    Its log entries hold `loss`, `learning_rate`, `grad_norm`, `images_per_second` and `waiting` (the share of time in which
    the next batch was not there), an evaluation's `eval_loss` and `eval_` scores. The latest captions are in `captions`.
    """

    model: Any

    def __init__(
        self,
        made: AssembledCaptioner,
        args: Seq2SeqTrainingArguments,
        train: Pairs | TaskMixture,
        collate: Collate,
        validation: Validation | Validations | None,
        options: TrainOptions,
    ) -> None:
        super().__init__(
            model=made.model,
            args=args,
            train_dataset=train,
            eval_dataset=validation.pairs if validation else None,
            data_collator=collate,
            compute_loss_func=partial(token_loss, label_smoothing=options.label_smoothing),
        )
        self.model_accepts_loss_kwargs = False  # the loss is ours: the model need not hear of the number of tokens
        self.made, self.pairs, self.collate, self.validation, self.options = made, train, collate, validation, options
        self.evaluating: Callable[[int, int], None] = lambda _done, _total: None
        self.failed: Callable[[Failure], None] = lambda _: None
        self.meter = Meter()
        self.captions: dict[str, str] = {}
        made.encode.to(made.model.device)  # its mean and deviation are not part of the model
        self._normalise, self._seeing = made.encode.normalise, made.encode.encoder.config
        self._family = family_of(made.model.config.to_dict())

    # Batches

    def _get_train_sampler(self, *given: Any) -> Any:
        if isinstance(self.pairs, TaskMixture):
            return TaskSampler(self.pairs, self.args.data_seed or 0)
        return super()._get_train_sampler(*given)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        began = time.monotonic()
        if self.meter.began is None:
            self.meter.began = began
        taken = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.waited += time.monotonic() - began
        return taken

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pixels travel as bytes and become the encoder's input on the device."""
        inputs = dict(inputs)
        self.meter.lost += inputs.pop("failures", ())
        ready: dict[str, Any] = super()._prepare_inputs(inputs)
        ready["pixel_values"] = self._normalise(ready["pixel_values"])
        return ready

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.meter.loss = self.meter.loss + loss.detach()
        self.meter.images += len(inputs["labels"])
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **named: Any) -> Any:
        if self.options.freeze != "none":
            freezing.train(self.model)  # the Trainer has just put all of it into training mode
        if self.options.mask_patches and model.training:
            hidden = hide_patches(inputs["pixel_values"], patch_size(self._seeing), self.options.mask_patches)
            inputs = {**inputs, "pixel_values": hidden}
        given_labels = {"labels": inputs["labels"]}
        return super().compute_loss(model, self._family.inputs(self.model, inputs) | given_labels, *given, **named)

    # Reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._tell_lost()
            logs = {**logs, **self._measured()}
            self.meter.reset(self.state.global_step)
            if not math.isfinite(logs["loss"]):
                raise CapcliError(
                    f"the loss became {logs['loss']} before step {self.state.global_step}: lower --learning-rate, lengthen "
                    "--warmup, or try another --dtype; --resume goes on from the last checkpoint"
                )
        super().log(logs, start_time)

    def _tell_lost(self) -> None:
        lost = gather_object(self.meter.lost)
        for failure in lost:
            self.failed(failure)
        if lost and not self._mean(float(self.meter.images - len(self.meter.lost))):
            raise CapcliError(
                f"none of the last {counted(len(lost), 'image')} could be loaded; the first was {printable(lost[0].name)}: "
                f"{lost[0].message}. Bring the data back; --resume goes on from the last checkpoint"
            )

    def _measured(self) -> dict[str, float]:
        meter, processes = self.meter, self.accelerator.num_processes
        seconds = meter.seconds
        return {
            "loss": self._mean(meter.loss) / max(self.state.global_step - meter.since, 1),
            "images_per_second": meter.images * processes / seconds,
            "waiting": min(meter.waited / seconds, 1.0),
        }

    def _mean(self, value: Tensor | float) -> float:
        """Over the processes."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.gather(tensor.reshape(1)).mean().item())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Loss and scores on the validation images, logged as `eval_*`."""
        assert self.validation is not None
        began = time.monotonic()
        held, made = self.validation, self.made
        training = self.model.training
        self.model.eval()
        losses = held.losses(self.model, self._prepare_inputs, self.accelerator)
        metrics = {f"eval_{name}": value for name, value in losses.items()}
        if held.captioned:
            with captioner_of(made, held.collate.size) as captioner:
                self.captions = held.captions(captioner, self.accelerator, self.evaluating)
            metrics |= {f"eval_{name}": value for name, value in held.scores(self.captions).items()}
        self.model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.pause(time.monotonic() - began)
        return metrics

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        if self.args.should_save:  # transformers asks every process of late, and earlier only the one that writes
            save_captioner(
                str(output_dir or self.args.output_dir), self.model, self.made.tokenizer, self.made.processor
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        folder = os.path.join(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with written(folder):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        open_report = {"since": self.meter.since, "loss": gather_object([float(self.meter.loss)])}
        if self.args.should_save:
            mark = {"step": self.state.global_step, "processes": self.args.world_size, "report": open_report}
            with written(folder):
                atomic.replace(os.path.join(folder, MARK), [json.dumps(mark).encode()])
        self.meter.pause(time.monotonic() - began)

    def take_up(self, folder: str) -> None:
        """Goes on with the report that was open when the checkpoint was written. Raises CapcliError for other processes."""
        with open(os.path.join(folder, MARK), encoding="utf-8") as file:
            mark = json.load(file)
        if mark["processes"] != self.args.world_size:
            raise CapcliError(
                f"{folder} is of a run on {mark['processes']} processes and this one has {self.args.world_size}: "
                "the batches would be others"
            )
        self.meter.reset(mark["report"]["since"], mark["report"]["loss"][self.args.process_index])


@contextmanager
def written(folder: str) -> Iterator[None]:
    """Around the writing of a checkpoint. Raises CapcliError when that fails, as on a full disk."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # what torch raises when it cannot write is a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CapcliError(
            f"the checkpoint {printable(folder)} cannot be written: {reason}. Make room there; --resume goes "
            "on from the one before"
        ) from error
