"""The generate backend's captioner: any model that transformers loads, by its own `generate()`, batched by image shape.

It promises less than the slots backend: captions may depend on the batch in near ties, and samples depend on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from capcli.captioning.feed import POLL_SECONDS, Arrivals, Deliver, LocalArrivals, OrderedDelivery, Result
from capcli.captioning.processed import HOPELESS, MAX_NEW_TOKENS, Given, answer_text, one_line, whole_image
from capcli.captioning.slot_captioner import ImageLike, caption_text, overflow
from capcli.decoding import noise
from capcli.decoding.activity import Activity
from capcli.decoding.loop import out_of_memory
from capcli.decoding.settings import as_ids
from capcli.decoding.shapes import free_memory
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.models.auto import AutoModel, load_auto
from capcli.models.checkpoint import puts_spaces, quiet_transformers
from capcli.models.document_text import FieldDecoder
from capcli.models.dtypes import DTYPES
from capcli.models.families import FILES, family_of
from capcli.models.model_files import ModelFiles, list_model, weight_files
from capcli.models.modules import plain_ids
from capcli.options import MAX_PIXELS, GenerationOptions
from capcli.records import Candidate, Caption, Failure, Loaded

BATCH = {"cpu": 4}  # images that are generated together, by device type
GPU_BATCH = 16
LOGITS_SHARE = 8  # at most this fraction of the free memory holds the logits of a batch, from which scores are computed
WINDOW = 4  # batches of images that wait for others of their shape


@dataclass(frozen=True)
class GenerateSettings:
    """What captions depend on: `generation` is the resolved GenerationConfig, `ends` are the ids that end a caption."""

    generation: GenerationConfig
    given: Given
    ends: frozenset[int] = frozenset()
    seed: int = 0

    @property
    def rows(self) -> int:
        """Sequences per image that `generate()` computes at once."""
        config = self.generation
        return max(config.num_beams or 1, config.num_return_sequences or 1)


@dataclass
class Item:
    """An image with the inputs of the model for it."""

    index: int
    loaded: Loaded
    inputs: Mapping[str, Tensor]

    @property
    def shape(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Images whose shapes are equal can be in one batch without padding."""
        return tuple((name, tuple(value.shape)) for name, value in self.inputs.items())


@dataclass
class Waiting:
    """Images that wait for a batch, by shape."""

    by_shape: dict[Any, list[Item]] = field(default_factory=dict)
    count: int = 0
    newest: int = 0  # the index of the last image

    def add(self, item: Item) -> None:
        self.by_shape.setdefault(item.shape, []).append(item)
        self.count, self.newest = self.count + 1, item.index

    def full(self, batch: int) -> bool:
        return any(len(items) >= batch for items in self.by_shape.values())

    def take(self, batch: int) -> list[Item]:
        """A full batch, else the images of the shape that has waited longest.

        Those come first too once WINDOW batches have overtaken them: results are delivered in order, and wait for them.
        """
        oldest = min(self.by_shape, key=lambda s: self.by_shape[s][0].index)
        shape = next((s for s, items in self.by_shape.items() if len(items) >= batch), oldest)
        if self.newest - self.by_shape[oldest][0].index >= WINDOW * batch:
            shape = oldest
        items = self.by_shape[shape]
        taken, left = items[:batch], items[batch:]
        self.by_shape[shape] = left
        if not left:
            del self.by_shape[shape]
        self.count -= len(taken)
        return taken


class GenerateCaptioner:
    """Captions images with one model. Use it from one thread at a time."""

    def __init__(self, auto: AutoModel, files: ModelFiles, dtype: str) -> None:
        self.auto, self.files, self.dtype = auto, files, dtype
        self.device: torch.device = auto.model.device
        self._is_family = files.config["model_type"] in FILES
        self._spaced = self._is_family and puts_spaces(auto.tokenizer)
        self._fields = FieldDecoder.of(auto.tokenizer) if self._is_family else None
        self._succeeded, self._unusable = 0, 0

    def assume_usable(self) -> None:
        """An earlier run has captioned with the model: what it cannot process are failures of those images."""
        self._succeeded += 1

    def caption(
        self,
        images: Iterable[ImageLike],
        options: GenerationOptions,
        *,
        prompt: str | None = None,
        keep_prompt: bool = False,
        tags: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Result]:
        """As `Captioner.caption`. Raises UsageError at once for settings that generate() does not take, and for tags."""
        if tags is not None:
            raise UsageError(f"{self.files.name} reads no tags: leave them out")
        settings = self.settings(options, Given(prompt, None, self.auto.bound_edge(None), keep_prompt))
        return self._captions(images, settings, batch_size, max_pixels)

    def _captions(
        self, images: Iterable[ImageLike], settings: GenerateSettings, batch_size: int | None, max_pixels: int
    ) -> Iterator[Result]:
        ready: list[Result] = []
        load = whole_image(settings.given.max_edge, max_pixels)
        batch = self.batch_size(settings, batch_size, len(images) if isinstance(images, Sized) else None)
        for _ in self.run(LocalArrivals(images, load), settings, batch, lambda _, result: ready.append(result)):
            yield from ready
            ready.clear()

    def settings(self, options: GenerationOptions, given: Given) -> GenerateSettings:
        """The settings of a run: `options`, with the model's generation_config for those that are None.

        Raises UsageError for settings that generate() refuses.
        """
        chosen = {name: as_lists(value) for name, value in asdict(options).items() if value is not None}
        seed = chosen.pop("seed", 0)
        fields = {**self.auto.generation.to_dict(), **chosen}
        returned, beams = fields.get("num_return_sequences") or 1, fields.get("num_beams") or 1
        if returned > beams and not (fields.get("do_sample") and beams == 1):
            raise UsageError(
                f"{returned} captions per image need at least as many beams (--num-beams {returned}) or sampling (--do-sample)"
            )
        config = new_config(fields)
        if config.max_new_tokens is None and not self._is_family:
            config.max_new_tokens = MAX_NEW_TOKENS
        return GenerateSettings(config, given, self._ends(config), seed)

    def _ends(self, config: GenerationConfig) -> frozenset[int]:
        """The end tokens; BLIP's are not those of its generation_config."""
        found = config.eos_token_id
        if self._is_family:
            found = family_of(self.files.config).generation(self.files.config, config.to_dict()).get("eos_token_id")
        return frozenset(as_ids(found))

    def batch_size(self, settings: GenerateSettings, given: int | None, images: int | None) -> int:
        """Images per batch: as `given`, else what is worthwhile on the device and leaves room for the logits."""
        if given is None:
            vocabulary = int(self.auto.model.config.get_text_config(decoder=True).vocab_size)
            tokens = settings.generation.max_new_tokens or settings.generation.max_length or 20
            logits = 4 * vocabulary * tokens * settings.rows
            fitting = free_memory(self.device) // LOGITS_SHARE // logits
            given = max(1, min(BATCH.get(self.device.type, GPU_BATCH), fitting))
        return given if images is None else max(1, min(given, images))

    def run(
        self,
        arrivals: Arrivals,
        settings: GenerateSettings,
        batch: int,
        deliver: Deliver,
        *,
        ordered: bool = True,
        stop: Callable[[], bool] = lambda: False,
        on_shrink: Callable[[int], None] = lambda _: None,
        activity: Activity | None = None,
    ) -> Iterator[None]:
        """Caption all arrivals; `deliver(index, result)` is called for each, in the order of arrival if `ordered`.

        Yields at least every POLL_SECONDS. Once `stop()` is true the batch under way is finished, and images that wait for
        a batch are left without a result. `on_shrink` is called with the new batch size when memory ran out. `activity` is
        kept up to date.
        """
        give = OrderedDelivery(deliver).put if ordered else deliver
        activity = activity or Activity()
        waiting, indices = Waiting(), iter(range(2**62))

        def fill(wait: float) -> None:
            """Take arrivals until there is a full batch, the window is full, or nothing arrives within `wait` seconds."""
            while not (stop() or arrivals.done or waiting.full(batch) or waiting.count >= WINDOW * batch):
                arrival = arrivals.take(wait)
                if arrival is None:
                    return
                index = next(indices)
                prepared = arrival if isinstance(arrival, Failure) else self._prepare(index, arrival, settings)
                if isinstance(prepared, Failure):
                    give(index, prepared)
                else:
                    waiting.add(prepared)

        while True:
            while not (stop() or arrivals.done or waiting.full(batch) or waiting.count >= WINDOW * batch):
                fill(POLL_SECONDS)
                yield
            if stop() or not waiting.count:
                break
            items = waiting.take(batch)
            activity.change(decoding=len(items))
            work = Background(partial(self._generate, items, settings))
            while not work.wait(POLL_SECONDS):
                fill(0)
                yield
            activity.change(decoding=-len(items))
            outcome = work.result()
            if outcome.batch is not None and outcome.batch < batch:
                batch = outcome.batch
                on_shrink(batch)
            for item, result in outcome.results:
                give(item.index, result)
            yield
        yield

    def _prepare(self, index: int, loaded: Loaded, settings: GenerateSettings) -> Item | Failure:
        """The model's inputs for an image. A processor that cannot take the image makes it a failure."""
        try:
            loaded, inputs = settings.given.inputs(self.auto.inputs, loaded)
            return Item(index, loaded, inputs)
        except ImageError as error:
            return Failure(loaded.name, error.kind, str(error))

    def _generate(self, items: list[Item], settings: GenerateSettings) -> BatchOutcome:
        """Results of a batch. Those of a batch for which memory does not suffice, or that fails, come in smaller batches."""
        try:
            return BatchOutcome(list(zip(items, self._results(items, settings), strict=True)))
        except (torch.OutOfMemoryError, MemoryError) as error:
            kind, message = "out-of-memory", one_line(error)
        except Exception as error:  # of the model's code
            kind, message = ("out-of-memory" if out_of_memory(error) else "model"), one_line(error)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(items) == 1:
            return BatchOutcome([(items[0], self._failure(items[0], kind, message))])
        half = len(items) // 2
        parts = [self._generate(part, settings) for part in (items[:half], items[half:])]
        sizes = [part.batch for part in parts if part.batch is not None]
        smaller = min([half, *sizes]) if kind == "out-of-memory" else None
        return BatchOutcome([pair for part in parts for pair in part.results], smaller)

    def _failure(self, item: Item, kind: str, message: str) -> Failure:
        """Raises CapcliError instead where the model has captioned nothing yet and failed for several images."""
        self._unusable += not self._succeeded
        if self._unusable >= HOPELESS:
            raise CapcliError(f"{self.files.name} cannot caption: {message}")
        return Failure(item.loaded.name, kind, f"the model cannot process it: {message}")

    @torch.inference_mode()
    def _results(self, items: Sequence[Item], settings: GenerateSettings) -> list[Result]:
        """The captions of images of one shape."""
        model = self.auto.model
        inputs = {name: self._placed(torch.cat([item.inputs[name] for item in items])) for name in items[0].inputs}
        if settings.generation.do_sample:
            names = "\0".join(item.loaded.name for item in items)
            torch.manual_seed(noise.key(settings.seed, names) % (1 << 63))
        with quiet_transformers():
            out = model.generate(
                **inputs,
                generation_config=settings.generation,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
            )
        captions = self._captions_of(out, settings)
        each = len(captions) // len(items)
        self._succeeded += len(items)
        return [self._result(item, captions[n * each : (n + 1) * each], settings) for n, item in enumerate(items)]

    def _placed(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.auto.model.dtype) if value.is_floating_point() else value

    def _captions_of(self, out: Any, settings: GenerateSettings) -> list[tuple[list[int], float]]:
        """The new tokens of each returned sequence, up to its end token, and their mean raw log-probability."""
        beams = getattr(out, "beam_indices", None)
        count = len(out.logits) if beams is None else beams.shape[1]
        tokens = out.sequences[:, out.sequences.shape[1] - count :]
        if beams is None:
            beams = torch.arange(len(tokens), device=tokens.device)[:, None].expand(-1, count)
        picked = [
            step.float().log_softmax(-1)[beams[:, n].clamp(min=0), tokens[:, n]]
            for n, step in enumerate(out.logits[:count])
        ]
        log_probabilities = torch.stack(picked, 1).tolist()
        captions = []
        for ids, values in zip(tokens.tolist(), log_probabilities, strict=True):
            length = next((n + 1 for n, token in enumerate(ids) if token in settings.ends), count)
            captions.append((ids[:length], sum(values[:length]) / max(length, 1)))
        return captions

    def _result(self, item: Item, captions: Sequence[tuple[list[int], float]], settings: GenerateSettings) -> Result:
        loaded = item.loaded
        if not all(np.isfinite(score) for _, score in captions):
            return overflow(loaded.name, self.dtype)
        candidates = [Candidate(self._text(ids, loaded.prompt, settings), score) for ids, score in captions]
        if settings.generation.do_sample and (settings.generation.num_beams or 1) == 1:
            candidates.sort(key=lambda candidate: candidate.score or 0.0, reverse=True)
        return Caption(loaded.name, tuple(candidates), loaded.facts)

    def _text(self, ids: Sequence[int], prompt: str | None, settings: GenerateSettings) -> str:
        tokenizer = self.auto.tokenizer
        if self._fields and (found := self._fields.json((*plain_ids(tokenizer, prompt), *ids))):
            return found
        if self._is_family:
            return settings.given.kept(caption_text(tokenizer, ids, spaced=self._spaced), prompt)
        return settings.given.kept(answer_text(self.auto, ids), prompt)


@dataclass
class BatchOutcome:
    """The results of a batch, and a smaller batch size where memory ran out."""

    results: list[tuple[Item, Result]]
    batch: int | None = None


class Background:
    """One call in a thread, so that the main thread can show progress and receive signals meanwhile."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        # A daemon: a second interrupt ends the program without waiting for the batch.
        self._thread = threading.Thread(target=self._run, name="capcli-generate", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised again by `result`
            self._error = error

    def wait(self, timeout: float) -> bool:
        """Whether the call has ended; waits at most `timeout` seconds for it."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """The value of the ended call, or its error."""
        if self._error is not None:
            raise self._error
        return self._value


def as_lists(value: Any) -> Any:
    """A value with lists in place of tuples, which transformers refuses."""
    return [as_lists(each) for each in value] if isinstance(value, list | tuple) else value


def new_config(fields: Mapping[str, Any]) -> Any:
    loader: Any = GenerationConfig
    return loader(**fields)


def load_generate(
    files: ModelFiles, dtype: str, device: torch.device, quantize: str | None = None
) -> GenerateCaptioner:
    """Load a captioner from a folder. `quantize` is "4bit", "8bit" or None.

    A model that is larger than the free memory of the one GPU is spread over all GPUs, where there are several.
    Raises UsageError where a package for the quantisation is missing, and CapcliError where the model cannot be loaded.
    """
    placed: dict[str, Any] = {}
    if quantize is not None:
        placed = {"quantization_config": quantization(quantize, dtype), "device_map": {"": str(device)}}
    elif device.type == "cuda" and torch.cuda.device_count() > 1 and weight_bytes(files) > free_memory(device):
        placed = {"device_map": "auto"}
    return GenerateCaptioner(load_auto(files, dtype, device, **placed), files, dtype)


def quantization(name: str, dtype: str) -> Any:
    """The settings of bitsandbytes for `4bit` or `8bit`. Raises UsageError where the package is missing."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"--quantize {name} needs the package bitsandbytes: pip install bitsandbytes")
    if name == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
    )


def weight_bytes(files: ModelFiles) -> int:
    """The size of a folder's weight files."""
    listing = list_model(files.folder)
    return sum(os.path.getsize(listing.fetch(name)) for name in weight_files(listing))
