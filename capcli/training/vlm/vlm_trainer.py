"""The Trainer and the validation of a vision-language model's adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Subset
from transformers import Seq2SeqTrainer

from capcli.captioning.prompts import Prompts
from capcli.captioning.vlm_captioner import VlmCaptioner
from capcli.models.families import IGNORED
from capcli.options import GenerationOptions
from capcli.records import Caption, Failure, Loaded
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.loop.validation import Batches, Prepare, Validation
from capcli.training.vlm.vlm_assembly import AssembledVlm
from capcli.training.vlm.vlm_pairs import VlmPairs, answers_loss


class VlmTrainer(CaptionTrainer):
    """A CaptionTrainer whose batches are lists of samples, see `VlmCollate`."""

    assembled: Any

    def read_model(self, assembled: Any) -> None:
        """Does nothing: the processor prepares the batches."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        self.meter.lost += inputs.pop("failures", ())
        prepared: dict[str, Any] = Seq2SeqTrainer._prepare_inputs(self, inputs)  # noqa: SLF001
        return prepared

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None, **_: Any
    ) -> Any:
        """As the Trainer's with `token_loss`: the sum over the tokens of the answers, divided by their number in the update."""
        total = answers_loss(model, inputs, self.options.label_smoothing)
        if not total.requires_grad:  # no image could be loaded
            total = total + 0.0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)
        if num_items_in_batch is None:
            count: Any = (inputs["labels"] != IGNORED).sum()
        else:
            count = torch.as_tensor(num_items_in_batch, device=total.device)
            total = total * (self.accelerator.num_processes if self.args.average_tokens_across_devices else 1)
        loss = total / count.clamp(min=1)
        return (loss, None) if return_outputs else loss

    def captioner(self) -> Any:
        return captioner_of_vlm(self.assembled)


@contextmanager
def captioner_of_vlm(assembled: AssembledVlm) -> Iterator[VlmCaptioner]:
    """A captioner that shares the weights of a model in training; afterwards the model's state is restored."""
    training = assembled.model.training
    assembled.model.eval()
    attention = assembled.auto.model.config.get_text_config(decoder=True)._attn_implementation  # noqa: SLF001
    captioner = assembled.captioner()
    try:
        with torch.inference_mode():
            yield captioner
    finally:
        captioner.step.text.set_attn_implementation(attention)
        assembled.model.train(training)


@dataclass(frozen=True)
class VlmValidation(Validation):
    """The validation of a vision-language model."""

    assembled: AssembledVlm | None = field(default=None, kw_only=True)

    def sums(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> tuple[float, float]:
        indices = range(accelerator.process_index, len(self.pairs), accelerator.num_processes)
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for batch in self._batches(Subset(self.pairs, indices), self.collate):
            inputs = prepare(batch)
            labels: Tensor = inputs["labels"]
            with torch.inference_mode(), accelerator.autocast():
                total = answers_loss(model, inputs)
            sums += torch.stack([total.double(), (labels != IGNORED).sum().double()]).to(sums)
        total_loss, count = accelerator.reduce(sums).tolist()
        return float(total_loss), float(count)

    def captions(
        self, captioner: Any, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        assert self.assembled is not None
        indices = self.captioned[accelerator.process_index :: accelerator.num_processes]
        options = GenerationOptions(num_return_sequences=1, max_new_tokens=self.assembled.max_length, do_sample=False)
        settings = captioner.settings(options, replace(self.assembled.given, prompts=Prepared()))
        captions: list[tuple[str, str]] = []

        def deliver(_: int, result: Caption | Failure) -> None:
            if isinstance(result, Caption):
                captions.append((result.name, result.text))
            progress(len(captions), len(indices))

        arrivals = Batches(self._batches(Subset(WithPrompts(self.pairs), indices), list))
        shapes = captioner.shapes(settings, len(indices))
        for _ in captioner.run(arrivals, settings, shapes, deliver):
            pass
        return dict(gather_object(captions))


class Prepared(Prompts):
    """The prompts that the images have already."""

    def __init__(self) -> None:
        super().__init__("")

    def of(self, prepared: str | None) -> Any:
        return prepared


class WithPrompts(torch.utils.data.Dataset[Loaded | Failure]):
    """Whole images with their prompts, named by their indices, because their own names may repeat."""

    def __init__(self, pairs: Any) -> None:
        self._pairs: VlmPairs = pairs

    def __getitem__(self, index: int) -> Loaded | Failure:
        loaded = self._pairs.images.loaded(index)
        if isinstance(loaded, Failure):
            return replace(loaded, name=str(index))
        return replace(loaded, name=str(index), prompt=self._pairs.prompt(index))
