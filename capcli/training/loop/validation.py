"""Validation of a captioner in training: the loss on all validation captions, and scores of generated captions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from capcli.captioning.feed import Arrivals
from capcli.captioning.model import Model
from capcli.captioning.slot_captioner import SlotCaptioner
from capcli.errors import CapcliError
from capcli.metrics import Scorer
from capcli.models.attention import use_attention
from capcli.models.families import IGNORED, family_of, last_logits
from capcli.models.model_files import ModelFiles
from capcli.options import GenerationOptions
from capcli.records import Caption, Failure, Loaded
from capcli.runtimes.eager import Eager
from capcli.training.data.pairs import Collate, Images, Pairs
from capcli.training.loop.loss import token_sum
from capcli.training.model.assembly import AssembledCaptioner

Prepare = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Validation:
    """The validation data of a run, or of one of its tasks.

    pairs: images with captions for the loss. captioned: indices of the images to generate captions for.
    references: the captions of those images in the data, by index as a string. scorer: None computes no scores.
    question: the text that the encoder reads, None for the model's default. encoder_ids: the token ids that it reads
        instead where each image has its own, by index as a string.
    """

    pairs: Pairs
    collate: Collate
    captioned: Sequence[int]
    references: Mapping[str, Sequence[str]]
    scorer: Scorer | None
    batch_size: int
    workers: int
    question: str | None = None
    encoder_ids: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def losses(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> dict[str, float]:
        """`loss`: the mean cross-entropy over all tokens of all validation captions, each counted once on any number of
        processes. Raises CapcliError when no image can be loaded.
        """
        return {"loss": mean_loss(*self.sums(model, prepare, accelerator))}

    def sums(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> tuple[float, float]:
        """The summed cross-entropy over those tokens, and their number."""
        indices = range(accelerator.process_index, len(self.pairs), accelerator.num_processes)
        family = family_of(model.config.to_dict())
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for batch in self._batches(Subset(self.pairs, indices), self.collate):
            inputs = prepare(batch)
            labels: Tensor = inputs.pop("labels")
            with torch.inference_mode(), accelerator.autocast():
                logits = last_logits(model(**family.inputs(model, inputs)), labels.shape[1])
            sums += torch.stack([token_sum(logits, labels).double(), (labels != IGNORED).sum().double()]).to(sums)
        total, count = accelerator.reduce(sums).tolist()
        return float(total), float(count)

    def captions(
        self, captioner: SlotCaptioner, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """The captions of the `captioned` images that could be loaded, by index as a string; in each process all of them."""
        indices = self.captioned[accelerator.process_index :: accelerator.num_processes]
        settings = captioner.settings(GenerationOptions(num_return_sequences=1), self.question)
        captions: list[tuple[str, str]] = []

        def deliver(_: int, result: Caption | Failure) -> None:
            if isinstance(result, Caption):
                captions.append((result.name, result.text))
            progress(len(captions), len(indices))

        for group in self._by_encoder_length(indices):
            images = NamedImages(self.pairs.images, self._encoder_ids_of)
            arrivals = Batches(self._batches(Subset(images, group), list))
            group_settings = replace(settings, encoder_ids=self.encoder_ids.get(str(group[0]), settings.encoder_ids))
            shapes = captioner.shapes(group_settings, len(group))
            for _ in captioner.run(arrivals, group_settings, shapes, deliver):
                pass
        return dict(gather_object(captions))

    def _encoder_ids_of(self, index: int) -> tuple[int, ...]:
        """The ids that the encoder reads for this image only: its tags or its own question."""
        if self.pairs.tags is not None:
            return tuple(self.pairs.tags[index].tolist())
        return self.encoder_ids.get(str(index), ())

    def _by_encoder_length(self, indices: Sequence[int]) -> list[list[int]]:
        """The indices in groups with the same number of encoder ids: the shapes of a captioner's run are fixed."""
        groups: dict[int, list[int]] = {}
        for index in indices:
            groups.setdefault(len(self.encoder_ids.get(str(index), ())), []).append(index)
        return list(groups.values())

    def samples(self, captions: Mapping[str, str], count: int) -> list[tuple[str, str, str]]:
        """Name, generated caption and one reference of the first `count` captioned images."""
        first = self.captioned[:count]
        return [(self.pairs.images.name(n), captions.get(str(n), ""), self.references[str(n)][0]) for n in first]

    def scores(self, captions: Mapping[str, str]) -> dict[str, float]:
        """BLEU, ROUGE-L and CIDEr of captions by index as a string; empty without captions."""
        if self.scorer is None or not captions:
            return {}
        return self.scorer.score(captions)

    def _batches(self, dataset: Any, collate: Any) -> Iterator[Any]:
        return iter(
            DataLoader(
                dataset,
                batch_size=self.batch_size,
                collate_fn=collate,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
        )


def mean_loss(total: float, count: float) -> float:
    """Raises CapcliError for no tokens."""
    if not count:
        raise CapcliError("none of the validation images can be loaded any more: restore them")
    return total / count


class NamedImages(torch.utils.data.Dataset[Loaded | Failure]):
    """Images as the decode loop takes them, named by their indices, because their own names may repeat."""

    def __init__(self, images: Images, encoder_ids: Callable[[int], tuple[int, ...]]) -> None:
        self._images, self._encoder_ids = images, encoder_ids

    def __getitem__(self, index: int) -> Loaded | Failure:
        loaded = self._images.loaded(index)
        if isinstance(loaded, Failure):
            return replace(loaded, name=str(index))
        return replace(loaded, name=str(index), encoder_ids=self._encoder_ids(index))


class Batches(Arrivals):
    """The images of a DataLoader's batches as arrivals for the decode loop."""

    def __init__(self, batches: Iterator[list[Loaded | Failure]]) -> None:
        self._images = (image for batch in batches for image in batch)
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:  # noqa: ARG002
        image = next(self._images, None)
        self._done = image is None
        return image


@contextmanager
def captioner_of(assembled: AssembledCaptioner, size: tuple[int, int]) -> Iterator[SlotCaptioner]:
    """A captioner that shares the weights of a model in training; afterwards the model's state is restored."""
    model: Any = assembled.model
    encode, step, training = assembled.encode.to(model.device), assembled.step, model.training
    model.eval()
    config = model.config.to_dict()
    family, attention = family_of(config), step.decoder.config._attn_implementation  # noqa: SLF001
    use_attention(step.decoder)
    captioning_model = Model.of(
        config,
        assembled.tokenizer,
        runtime=Eager(encode, step, model.device, prefixed=encode.prefixed),
        dtype="float32",
        spec=assembled.spec,
        size=size,
        generation=family.generation(config, model.generation_config.to_dict()),
        positions=step.positions,
        vocabulary=step.vocabulary,
    )
    try:
        with torch.inference_mode():
            yield SlotCaptioner(captioning_model, ModelFiles("", "", None, config, {}))
    finally:
        step.decoder.set_attn_implementation(attention)
        model.train(training)
