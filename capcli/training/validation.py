"""How good the captioner is so far: the loss on all validation captions, and scores of captions it makes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from capcli.captioner import Captioner
from capcli.errors import CapcliError
from capcli.metrics import Scorer
from capcli.models.attention import use_attention
from capcli.models.build import Model, modules, puts_spaces
from capcli.models.families import IGNORED, family_of, last_logits
from capcli.models.files import ModelFiles
from capcli.options import GenerationOptions
from capcli.pixels import PixelSpec
from capcli.records import Caption, Failure, Loaded
from capcli.runtimes.eager import Eager
from capcli.stream import Arrivals
from capcli.training.loss import token_sum
from capcli.training.pairs import Collate, Images, Pairs

Prepare = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Validation:
    """What is held out: `pairs` for the loss; `captioned`, numbers of images, for captions that `scorer` judges."""

    pairs: Pairs
    collate: Collate
    captioned: Sequence[int]
    scorer: Scorer | None
    batch_size: int
    workers: int

    def loss(self, model: Any, prepare: Prepare, accelerator: Accelerator) -> float:
        """The mean cross-entropy over every token of every validation caption, each counted once whatever the processes.

        Raises CapcliError when no image can be loaded.
        """
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
        if not count:
            raise CapcliError("none of the images to validate with can be loaded any more: bring the data back")
        return float(total / count)

    def captions(
        self, captioner: Captioner, accelerator: Accelerator, progress: Callable[[int, int], None]
    ) -> dict[str, str]:
        """A caption for each of `captioned` that could be loaded, by its number in words; all of them on every process."""
        mine = self.captioned[accelerator.process_index :: accelerator.num_processes]
        images = self.pairs.images
        settings = captioner.settings(GenerationOptions(num_return_sequences=1))
        said: list[tuple[str, str]] = []

        def deliver(_: int, result: Caption | Failure) -> None:
            if isinstance(result, Caption):
                said.append((result.name, result.text))
            progress(len(said), len(mine))

        arrivals = Batches(self._batches(Subset(NamedImages(images), mine), list))
        shapes = captioner.shapes(settings, len(mine))
        for _ in captioner.run(arrivals, settings, shapes, deliver, questions=self.question):
            pass
        return dict(gather_object(said))

    def question(self, _index: int, loaded: Loaded) -> tuple[int, ...]:
        """An image's tags, where it has some."""
        tags = self.pairs.tags
        return () if tags is None else tuple(tags[int(loaded.name)].tolist())

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


class NamedImages(torch.utils.data.Dataset[Loaded | Failure]):
    """Images as the decode loop takes them, named by their numbers: names need not be unique."""

    def __init__(self, images: Images) -> None:
        self._images = images

    def __getitem__(self, index: int) -> Loaded | Failure:
        loaded = self._images.loaded(index)
        return replace(loaded, name=str(index))


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
    made = Model(
        runtime=Eager(encode, step, model.device, prefixed=encode.prefixed),
        dtype="float32",
        tokenizer=tokenizer,
        spec=spec,
        size=size,
        generation=family.generation(config, model.generation_config.to_dict()),
        positions=step.positions,
        vocabulary=step.vocabulary,
        question=getattr(family, "question", None),
        tag_tokens=config.get("tag_tokens", 0),
        spaced=puts_spaces(tokenizer),
    )
    try:
        with torch.inference_mode():
            yield Captioner(made, ModelFiles("", "", None, {}, {}))
    finally:
        step.decoder.set_attn_implementation(attention)
        model.train(training)
