"""How good the captioner is so far: the loss on all validation captions, and scores of captions it makes itself."""

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

from capcli.captioning.captioner import Captioner
from capcli.captioning.feed import Arrivals
from capcli.captioning.model import Model
from capcli.errors import CapcliError
from capcli.metrics import Scorer
from capcli.models.attention import use_attention
from capcli.models.checkpoint import modules
from capcli.models.families import IGNORED, family_of, last_logits
from capcli.models.model_files import ModelFiles
from capcli.options import GenerationOptions
from capcli.pixels import PixelSpec
from capcli.records import Caption, Failure, Loaded
from capcli.runtimes.eager import Eager
from capcli.training.data.pairs import Collate, Images, Pairs
from capcli.training.loop.loss import token_sum

Prepare = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Validation:
    """What is held out: `pairs` for the loss; `captioned`, numbers of images, for captions that `scorer` judges.

    `references` are the captions that people gave of those images, by number in words. `question` None is the one that the model
    is asked by itself; `encoder_ids` are what the encoder reads beside each image where that differs,
    by the image's number as a string.
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
        """The mean cross-entropy over every token of every validation caption, each counted once whatever the processes.

        Raises CapcliError when no image can be loaded.
        """
        return {"loss": mean_loss(*self.sums(model, prepare, accelerator))}

    def sums(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> tuple[float, float]:
        """The cross-entropy summed over those tokens, and how many there are."""
        mine = range(accelerator.process_index, len(self.pairs), accelerator.num_processes)
        family = family_of(model.config.to_dict())
        sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for batch in self._batches(Subset(self.pairs, mine), self.collate):
            inputs = prepare(batch)
            labels: Tensor = inputs.pop("labels")
            with torch.inference_mode(), accelerator.autocast():
                logits = last_logits(model(**family.inputs(model, inputs)), labels.shape[1])
            sums += torch.stack([token_sum(logits, labels).double(), (labels != IGNORED).sum().double()]).to(sums)
        total, count = accelerator.reduce(sums).tolist()
        return float(total), float(count)

    def captions(
        self, captioner: Captioner, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """A caption for each of `captioned` that could be loaded, by its number in words; all of them on every process."""
        mine = self.captioned[accelerator.process_index :: accelerator.num_processes]
        settings = captioner.settings(GenerationOptions(num_return_sequences=1), self.question)
        said: list[tuple[str, str]] = []

        def deliver(_: int, result: Caption | Failure) -> None:
            if isinstance(result, Caption):
                said.append((result.name, result.text))
            progress(len(said), len(mine))

        for alike in self._by_length(mine):
            arrivals = Batches(
                self._batches(Subset(NamedImages(self.pairs.images, self._own_encoder_ids), alike), list)
            )
            asked = replace(settings, encoder_ids=self.encoder_ids.get(str(alike[0]), settings.encoder_ids))
            shapes = captioner.shapes(asked, len(alike))
            for _ in captioner.run(arrivals, asked, shapes, deliver):
                pass
        return dict(gather_object(said))

    def _own_encoder_ids(self, number: int) -> tuple[int, ...]:
        """What one image's encoder is asked, where each is asked its own, or its tags."""
        if self.pairs.tags is not None:
            return tuple(self.pairs.tags[number].tolist())
        return self.encoder_ids.get(str(number), ())

    def _by_length(self, numbers: Sequence[int]) -> list[list[int]]:
        """Images that are asked questions of one length go together: a run has one shape."""
        lengths: dict[int, list[int]] = {}
        for number in numbers:
            lengths.setdefault(len(self.encoder_ids.get(str(number), ())), []).append(number)
        return list(lengths.values())

    def samples(self, captions: Mapping[str, str], count: int) -> list[tuple[str, str, str]]:
        """Of the first few images the name, the caption made of it, and one that a person gave."""
        shown = self.captioned[:count]
        return [(self.pairs.images.name(n), captions.get(str(n), ""), self.references[str(n)][0]) for n in shown]

    def scores(self, captions: Mapping[str, str]) -> dict[str, float]:
        """BLEU, ROUGE-L and CIDEr of captions by name; nothing where there are none."""
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
    if not count:
        raise CapcliError("none of the images to validate with can be loaded any more: bring the data back")
    return total / count


class NamedImages(torch.utils.data.Dataset[Loaded | Failure]):
    """Images as the decode loop takes them, named by their numbers: names need not be unique."""

    def __init__(self, images: Images, encoder_ids: Callable[[int], tuple[int, ...]]) -> None:
        self._images, self._encoder_ids = images, encoder_ids

    def __getitem__(self, index: int) -> Loaded | Failure:
        loaded = self._images.loaded(index)
        if isinstance(loaded, Failure):
            return replace(loaded, name=str(index))
        return replace(loaded, name=str(index), encoder_ids=self._encoder_ids(index))


class Batches(Arrivals):
    """Arrivals out of a loader's batches of them."""

    def __init__(self, batches: Iterator[list[Loaded | Failure]]) -> None:
        self._each = (one for batch in batches for one in batch)
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    def take(self, timeout: float | None = None) -> Loaded | Failure | None:  # noqa: ARG002
        one = next(self._each, None)
        self._done = one is None
        return one


@contextmanager
def captioner_of(model: Any, tokenizer: Any, spec: PixelSpec, size: tuple[int, int]) -> Iterator[Captioner]:
    """A model in training as the captioner it is by now; it goes on training as it was."""
    training = model.training
    model.eval()
    encode, step = modules(model, spec)
    config = model.config.to_dict()
    family, attention = family_of(config), step.decoder.config._attn_implementation  # noqa: SLF001
    use_attention(step.decoder)
    made = Model.of(
        config,
        tokenizer,
        runtime=Eager(encode, step, model.device, prefixed=encode.prefixed),
        dtype="float32",
        spec=spec,
        size=size,
        generation=family.generation(config, model.generation_config.to_dict()),
        positions=step.positions,
        vocabulary=step.vocabulary,
    )
    try:
        with torch.inference_mode():
            yield Captioner(made, ModelFiles("", "", None, {}, {}))
    finally:
        step.decoder.set_attn_implementation(attention)
        model.train(training)
