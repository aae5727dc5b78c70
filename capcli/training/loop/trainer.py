"""transformers' Seq2SeqTrainer with the loss, the pixels, the validation and the checkpoints of a captioner."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from capcli.errors import CapcliError
from capcli.models.checkpoint import quiet_transformers
from capcli.models.families import family_of
from capcli.models.model_files import PROCESSOR
from capcli.options import TrainOptions
from capcli.records import Failure
from capcli.storage import atomic
from capcli.text import counted, is_text, printable
from capcli.training.data.mixing import TaskMixture, TaskSampler
from capcli.training.data.pairs import Collate, Pairs
from capcli.training.loop import freezing
from capcli.training.loop.loss import token_loss
from capcli.training.loop.task_validation import Validations
from capcli.training.loop.validation import Validation, captioner_of
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.model.lora import is_adapted, save_adapter
from capcli.training.output.checkpoints import Manifest, complete

FULL = 1 << 20  # bytes that are free on a disk that counts as full
DEFAULT_PATCH = 16  # pixels, for encoders without patches


@dataclass
class Meter:
    """Sums since the last report, of this process."""

    since: int = 0  # the step of the last report
    loss: Tensor | float = 0.0  # summed over the updates
    images: int = 0
    lost: list[Failure] = field(default_factory=list)
    waited: float = 0.0  # seconds in which the next batch was not ready
    began: float | None = None  # when the first batch was requested
    paused: float = 0.0  # seconds of evaluations and checkpoints

    def reset(self, step: int, loss: float = 0.0) -> None:
        self.since, self.loss, self.images, self.lost = step, loss, 0, []
        self.waited, self.began, self.paused = 0.0, None, 0.0

    def pause(self, seconds: float) -> None:
        """Leaves out seconds that were not spent on training; those before the first batch are not counted anyway."""
        if self.began is not None:
            self.paused += seconds

    @property
    def seconds(self) -> float:
        """The seconds of training; above 0."""
        return 1e-9 if self.began is None else max(time.monotonic() - self.began - self.paused, 1e-9)


class CaptionTrainer(Seq2SeqTrainer):
    """Trains `assembled.model` on `train` with `token_loss`; without `validation` there are no evaluations.

    Images that can no longer be loaded are left out of the loss and passed to `failed` in every process with each report.
    Raises CapcliError, in every process, when no image since the last report could be loaded, when the loss is not finite,
    and when a checkpoint cannot be written.

    Log entries have `loss`, `learning_rate`, `grad_norm`, `images_per_second` and `waiting` (the share of time in which the
    next batch was not ready); those of evaluations have `eval_loss` and other `eval_` scores. `captions` holds the captions
    of the last evaluation. `evaluating` is called with the numbers of captioned images and of all that are captioned.
    """

    model: Any

    def __init__(
        self,
        assembled: AssembledCaptioner,
        args: Seq2SeqTrainingArguments,
        train: Pairs | TaskMixture,
        collate: Collate,
        validation: Validation | Validations | None,
        options: TrainOptions,
    ) -> None:
        super().__init__(
            model=assembled.model,
            args=args,
            train_dataset=train,
            eval_dataset=validation.pairs if validation else None,
            data_collator=collate,
            compute_loss_func=partial(token_loss, label_smoothing=options.label_smoothing),
        )
        self.model_accepts_loss_kwargs = (
            False  # token_loss gets num_items_in_batch; the model needs no arguments for it
        )
        self.assembled, self.pairs, self.collate = assembled, train, collate
        self.validation, self.options = validation, options
        self.evaluating: Callable[[int, int], None] = lambda _done, _total: None
        self.failed: Callable[[Failure], None] = lambda _: None
        self.meter = Meter()
        self.captions: dict[str, str] = {}
        self.run: str | None = None  # in the manifests of checkpoints
        self.read_model(assembled)

    def read_model(self, assembled: AssembledCaptioner) -> None:
        """Takes from the model how its batches are prepared."""
        encode = assembled.encode.to(assembled.model.device)  # its mean and deviation are not part of the model
        self._normalise, self._encoder_config = encode.normalise, encode.encoder.config
        self._family = family_of(assembled.model.config.to_dict())

    # Batches

    def _get_train_sampler(self, *arguments: Any) -> Any:
        if isinstance(self.pairs, TaskMixture):
            return TaskSampler(self.pairs, self.args.data_seed or 0)
        return super()._get_train_sampler(*arguments)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        began = time.monotonic()
        if self.meter.began is None:
            self.meter.began = began
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.meter.waited += time.monotonic() - began
        return batches

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves a batch to the device and normalises its pixels there: they are loaded as bytes."""
        inputs = dict(inputs)
        self.meter.lost += inputs.pop("failures", ())
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        prepared["pixel_values"] = self._normalise(prepared["pixel_values"])
        return prepared

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.meter.loss = self.meter.loss + loss.detach()
        self.meter.images += len(inputs["labels"])
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> Any:
        if self.options.freeze != "none":
            freezing.train(self.model)  # the Trainer has just called model.train()
        if self.options.mask_patches and model.training:
            size = patch_size(self._encoder_config)
            hidden = hide_patches(inputs["pixel_values"], size, self.options.mask_patches)
            inputs = {**inputs, "pixel_values": hidden}
        labels = {"labels": inputs["labels"]}
        return super().compute_loss(model, self._family.inputs(self.model, inputs) | labels, *arguments, **named)

    # Reports

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._report_lost()
            logs = {**logs, **self._measured()}
            self.meter.reset(self.state.global_step)
            self._refuse_infinite("loss", logs["loss"])
        super().log(logs, start_time)

    def _refuse_infinite(self, what: str, value: float) -> None:
        """Raises CapcliError for a value that is not finite."""
        if not math.isfinite(value):
            last = list(complete(str(self.args.output_dir)).values())[-1:]
            start = f"; --model {printable(last[0])} takes the weights of the last checkpoint" if last else ""
            raise CapcliError(
                f"the {what} became {value} before step {self.state.global_step}, and would again with --resume: start "
                f"another run with a lower --learning-rate, a longer --warmup or another --dtype{start}"
            )

    def _report_lost(self) -> None:
        lost = gather_object(self.meter.lost)
        for failure in lost:
            self.failed(failure)
        if lost and not self._mean(float(self.meter.images - len(self.meter.lost))):
            raise CapcliError(
                f"none of the last {counted(len(lost), 'image')} could be loaded; the first was {printable(lost[0].name)}: "
                f"{lost[0].message}. Restore the images; --resume continues from the last checkpoint"
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
        """The mean over the processes."""
        tensor = torch.as_tensor(value, dtype=torch.float32, device=self.args.device)
        return float(self.accelerator.gather(tensor.reshape(1)).mean().item())

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Computes loss and scores on the validation images and logs them as `eval_*`."""
        assert self.validation is not None
        began = time.monotonic()
        validation, training = self.validation, self.model.training
        self.model.eval()
        losses = validation.losses(self.model, self._prepare_inputs, self.accelerator)
        metrics = {f"eval_{name}": value for name, value in losses.items()}
        if validation.captioned:
            with self.captioner() as captioner:
                self.captions = validation.captions(captioner, self.accelerator, self.evaluating)
            metrics |= {f"eval_{name}": value for name, value in validation.scores(self.captions).items()}
        self.model.train(training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.meter.pause(time.monotonic() - began)
        return metrics

    def captioner(self) -> AbstractContextManager[Any]:
        """A context with a captioner that has the weights of the model in training."""
        assert self.validation is not None
        return captioner_of(self.assembled, self.validation.collate.size)

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        if self.args.should_save:  # newer versions of transformers call this in every process
            folder, assembled = str(output_dir or self.args.output_dir), self.assembled
            write_captioner(folder, self.model, assembled.tokenizer, assembled.processor)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes a checkpoint; one that cannot be written is removed, with what earlier attempts have left of it.

        Weights that are not finite are not saved: the checkpoint before them must remain.
        """
        began = time.monotonic()
        self._refuse_infinite("loss", self._mean(self.meter.loss))
        self._refuse_infinite("weights", largest(self.model.parameters()))
        folder = os.path.join(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with checkpoint_errors(folder):
            if self.args.should_save and os.path.isdir(folder):
                shutil.rmtree(folder)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        losses = gather_object([float(self.meter.loss)])
        if self.args.should_save:
            manifest = Manifest(self.state.global_step, self.args.world_size, self.meter.since, tuple(losses), self.run)
            with checkpoint_errors(folder):
                manifest.write(folder)
        self.meter.pause(time.monotonic() - began)

    def restore_meter(self, checkpoint: str) -> None:
        """Restores the sums since the last report. Raises CapcliError for a checkpoint of another number of processes."""
        manifest = Manifest.read(checkpoint)
        if manifest.processes != self.args.world_size:
            raise CapcliError(
                f"{checkpoint} was written by {manifest.processes} processes and this run has {self.args.world_size}, "
                "which would get other batches: start the same number"
            )
        self.meter.reset(manifest.since, manifest.losses[self.args.process_index])


def largest(parameters: Iterable[Tensor]) -> float:
    """The largest absolute value of the parameters; NaN if any of them is NaN."""
    norms = [torch.linalg.vector_norm(each.detach(), math.inf) for each in parameters if each.numel()]
    return float(torch.stack(norms).max()) if norms else 0.0


def save_captioner(folder: str | os.PathLike[str], model: Any, tokenizer: Any, processor: Mapping[str, Any]) -> None:
    """Writes a folder that transformers and `capcli caption` load: model, tokenizer and image processor.

    Raises CapcliError when it cannot be written.
    """
    path = os.fspath(folder)
    if not is_text(path):
        raise CapcliError(f"The model cannot be written to {printable(path)}: its name is not UTF-8; choose another.")
    try:
        write_captioner(path, model, tokenizer, processor)
    except Exception as error:
        raise CapcliError(f"Cannot write the model to {path}: {reason_of(error, path)}.") from error


def write_captioner(folder: str, model: Any, tokenizer: Any, processor: Mapping[str, Any]) -> None:
    """Writes the files of `save_captioner`. Raises OSError, and errors of the types of safetensors and tokenizers."""
    if is_adapted(model):
        save_adapter(folder, model)
        return
    os.makedirs(folder, exist_ok=True)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    text = json.dumps(dict(processor), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    atomic.replace(os.path.join(folder, PROCESSOR), [text.encode()])


@contextmanager
def checkpoint_errors(folder: str) -> Iterator[None]:
    """A context for writing a checkpoint: removes it and raises CapcliError when that fails, for example on a full disk."""
    try:
        yield
    except Exception as error:  # torch, safetensors and tokenizers raise errors of their own types
        reason = reason_of(error, folder)
        shutil.rmtree(folder, ignore_errors=True)
        before = complete(os.path.dirname(folder))
        resumption = "continues from the checkpoint before it" if before else "starts from the beginning"
        raise CapcliError(
            f"the checkpoint {printable(folder)} cannot be written: {reason}. Free some space; --resume {resumption}"
        ) from error


def reason_of(error: Exception, folder: str) -> str:
    """Why a file in `folder` cannot be written, in one line. torch's errors do not say that the disk is full."""
    with suppress(OSError):
        if not isinstance(error, OSError) and shutil.disk_usage(os.path.dirname(folder) or os.curdir).free < FULL:
            return os.strerror(errno.ENOSPC)
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def hide_patches(pixels: Tensor, size: int, share: float) -> Tensor:
    """Sets a random share of the patches of each image to 0, the mean of normalised pixels.

    `pixels` is [B, 3, height, width], `size` the side of a patch in pixels. The same number of patches is masked in each image.
    The choice uses torch's random state, which a resumed run restores.
    """
    rows, columns = (math.ceil(side / size) for side in pixels.shape[2:])
    count = round(share * rows * columns)
    order = torch.rand(len(pixels), rows * columns, device=pixels.device).argsort(1)
    visible = (order >= count).view(-1, 1, rows, columns).to(pixels.dtype)
    mask = visible.repeat_interleave(size, 2).repeat_interleave(size, 3)
    return pixels * mask[:, :, : pixels.shape[2], : pixels.shape[3]]


def patch_size(config: Any) -> int:
    """The side in pixels that one state of the encoder's last layer covers; Swin halves the states in each stage."""
    size = getattr(config, "patch_size", DEFAULT_PATCH)
    side = max(size) if isinstance(size, list | tuple) else int(size)
    return side * int(2 ** (len(getattr(config, "depths", (0,))) - 1))
