"""A captioner: a trained model with its tokenizer and image processor, and images in, captions out.

from capcli import Captioner

captioner = Captioner.load("nlpconnect/vit-gpt2-image-captioning")
for caption in captioner.caption(["beach.jpg", "dog.png"], num_beams=4):
    print(caption.name, caption.text, caption.score)
"""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from capcli import pixels
from capcli.captioning.feed import ArrivalFeed, Arrivals, Deliver, LocalArrivals, Order, Result
from capcli.captioning.model import Model, choose_dtype, device_of, load_model
from capcli.decoding import noise
from capcli.decoding.capacity import fitting_slots, paying_slots
from capcli.decoding.loop import Finished, Job, Shapes
from capcli.decoding.parallel import decode_in_parallel
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import NO_TOKEN, Settings, resolve
from capcli.engine.engine_json import engine_of
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.models.checkpoint import quiet_transformers
from capcli.models.dtypes import choose_device
from capcli.models.hub import find_model
from capcli.models.model_files import ModelFiles
from capcli.models.questions import gap_names, tag_ids, with_gaps
from capcli.options import DEFAULT_MODEL, MAX_PIXELS, GenerationOptions
from capcli.records import Candidate, Caption, Failure, Loaded
from capcli.text import is_text, printable, tag_text

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.generic]
# Between two of these a space is the tokenizer's, not the language's: CJK ideographs, kana, punctuation, full-width forms.
WIDE = "[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
UNSPACED = re.compile(f"(?<={WIDE}) (?={WIDE})")


class Captioner:
    """Captions images with one model. Not for use from several threads at once."""

    def __init__(self, model: Model, files: ModelFiles) -> None:
        self.model, self.files = model, files
        self._gaps = gap_names(model.tokenizer) if model.question else {}

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> Captioner:
        """Load a captioner from a folder or the hub.

        `device` is `auto`, `cpu` or `cuda[:n]`; `dtype` is `auto` (bfloat16 where the hardware computes in it), `float32`,
        `bfloat16`, `float16` or, on CPUs, `int8`. Raises UsageError for what cannot be right, CapcliError for files that
        cannot be had or used.
        """
        choose_device(device)  # which may refuse, before anything is fetched
        files = find_model(model, revision, quiet=True)
        engine = engine_of(files)
        place = device_of(device, engine)
        return cls(load_model(files, engine, place, choose_dtype(dtype, place, engine)), files)

    def caption(
        self,
        images: Iterable[ImageLike],
        *,
        prompt: str | None = None,
        keep_prompt: bool = False,
        tags: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        max_pixels: int = MAX_PIXELS,
        **generation: Any,
    ) -> Iterator[Result]:
        """Caption `images`: paths, PIL images of any mode, or arrays [height, width(, 1 | 3 | 4)].

        Arrays hold uint8, uint16, or floats from 0 to 1.

        Yields one `Caption` or `Failure` per image, in order; a bad image never raises. A path's `name` is the path, any other
        image's its index. `generation` takes transformers' names: num_beams, max_new_tokens, min_new_tokens, length_penalty,
        early_stopping, no_repeat_ngram_size, repetition_penalty, do_sample, temperature, top_k, top_p,
        num_return_sequences, seed. `tags` are of a captioner that reads them: a text per image, such as `[dog] [beach]`, None
        for an image without; images that have some come in a list. `batch_size` is how many images are decoded at once; None:
        as many as pay.
        Images are taken as they are needed. Raises, at once, TypeError for a name that is none of these, for one image alone
        and for tags that are no texts, UsageError for settings that cannot be, and for tags that are not one for each image
        or that the captioner does not read.
        """
        if isinstance(images, str | os.PathLike | Image.Image | np.ndarray):
            raise TypeError("caption() takes several images: put one into a list")
        unknown = [name for name in generation if name not in GenerationOptions.__dataclass_fields__]
        if unknown:
            known = ", ".join(GenerationOptions.__dataclass_fields__)
            raise TypeError(f"caption() knows no setting {', '.join(unknown)}; it knows {known}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
        settings = self.settings(GenerationOptions(**generation), prompt)
        questions = self._questions(tags, images)
        before = settings.prompt[1:] if keep_prompt else ()
        prepare = partial(self._prepare, max_pixels=max_pixels, questions=questions)
        return self._captions(images, settings, before, prepare, batch_size)

    def _questions(self, tags: Sequence[str | None] | None, images: Iterable[ImageLike]) -> list[tuple[int, ...]]:
        """What the encoder reads beside each image: its tags; nothing where there are none."""
        if tags is None:
            return []
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise TypeError("tags are a list, with a text or None for each image")
        strange = [each for each in tags if not isinstance(each, str | None)]
        if strange:
            raise TypeError(f"tags hold a {type(strange[0]).__name__}: each is a text, or None")
        if not isinstance(images, Sized):
            raise TypeError("tags are one for each image: put the images into a list")
        if not self.model.tag_tokens:
            raise UsageError(f"{self.files.name} reads no tags: leave them out")
        if len(tags) != len(images):
            raise UsageError(f"there are {len(tags)} tags and {len(images)} images: give a text, or None, for each")
        if wrong := [each for each in tags if each and not is_text(each)]:
            raise UsageError(f"the tags {printable(wrong[0])} are not UTF-8")
        return tag_ids(self.model.tokenizer, [tag_text(each) for each in tags], self.model.tag_tokens)

    def _captions(
        self,
        images: Iterable[ImageLike],
        settings: Settings,
        before: tuple[int, ...],
        prepare: Callable[[int, ImageLike], Loaded],
        batch_size: int | None,
    ) -> Iterator[Result]:
        shapes = self.shapes(settings, len(images) if isinstance(images, Sized) else None, batch_size)
        arrivals = LocalArrivals(images, prepare)
        ready: deque[Result] = deque()
        for _ in self.run(arrivals, settings, shapes, lambda _, result: ready.append(result), before=before):
            while ready:
                yield ready.popleft()

    def settings(self, options: GenerationOptions, prompt: str | None = None) -> Settings:
        """The search settings in force: `options`, and the checkpoint's where they say nothing."""
        ids = self._prompt_ids(prompt)
        settings = resolve(self.model.generation, options, () if self.model.question else ids)
        if self.model.question:
            settings = replace(settings, question=tuple(ids))
        elif self.model.tag_tokens:  # of images without tags
            settings = replace(settings, question=(NO_TOKEN,) * self.model.tag_tokens)
        room = self.model.positions - len(settings.prompt) + 1  # the last token is never given back to the decoder
        if room < 1:
            raise UsageError(
                f"the prompt has {len(settings.prompt)} tokens and the decoder holds {self.model.positions}: shorten it"
            )
        if settings.max_new_tokens > room:
            raise UsageError(
                f"--max-new-tokens is {settings.max_new_tokens}, but the decoder holds {self.model.positions} tokens, "
                f"prompt included: at most {room} here"
            )
        self._refuse_strange_ids(settings)
        return settings

    def _prompt_ids(self, prompt: str | None) -> list[int]:
        if prompt and not is_text(prompt):
            raise UsageError(f"the prompt {printable(prompt)} is not UTF-8")
        with quiet_transformers():
            if self.model.question:
                return self.model.question(self.model.tokenizer, prompt)
            if not prompt:
                return []
            ids: list[int] = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _refuse_strange_ids(self, settings: Settings) -> None:
        """Raises CapcliError for token ids that the decoder does not have."""
        s = settings
        forced = () if s.forced_bos_token_id is None else (s.forced_bos_token_id,)
        named = {"the prompt": (*s.prompt, *s.question), "forced tokens": (*forced, *s.forced_eos_token_ids)}
        named |= {"suppressed tokens": (*s.suppress_tokens, *s.begin_suppress_tokens)}
        for what, ids in named.items():
            strange = [i for i in ids if not 0 <= i < self.model.vocabulary and i != NO_TOKEN]
            if strange:
                raise CapcliError(
                    f"{what} hold token {strange[0]}, and the decoder has {self.model.vocabulary}: tokenizer or "
                    "generation_config of another model?"
                )

    def shapes(self, settings: Settings, count: int | None, batch_size: int | None = None, loops: int = 1) -> Shapes:
        """Slots and chunk of each of `loops` decode loops for `count` images; None: unknown, or more than ever fit.

        Raises UsageError where the runtime has no such batch.
        """
        runtime = self.model.runtime
        each = None if count is None else math.ceil(count / loops)
        if batch_size is None:
            most = fitting_slots(runtime.device, self._bytes_per_slot(settings)) // loops
            shapes = runtime.shapes(paying_slots(runtime.device, settings), settings, max(1, most), each)
        else:
            slots = batch_size // loops
            shapes = runtime.shapes(slots, settings)
            if each is not None and each < slots:
                shapes = runtime.shapes(max(1, each), settings)
        return replace(shapes, loops=loops)

    def run(
        self,
        arrivals: Arrivals,
        settings: Settings,
        shapes: Shapes,
        deliver: Deliver,
        *,
        ordered: bool = True,
        before: tuple[int, ...] = (),
        stop: Callable[[], bool] = lambda: False,
        shrunk: Callable[[Shapes], None] = lambda _: None,
    ) -> Iterator[None]:
        """Caption all arrivals; `deliver(index, result)` gets each result, by index of arrival, in order if `ordered`.

        A generator, so that the caller keeps the reins: it yields after every step. `before` are tokens to show before each
        caption. Once `stop` says so, no more images are taken and those under way are finished.
        """
        give = Order(deliver).put if ordered else deliver
        feed = ArrivalFeed(arrivals, partial(self._job, settings), give, stop)
        for ended in decode_in_parallel(feed, self.model.runtime.beside(shapes.loops), settings, shapes, shrunk):
            for done in ended:
                index, loaded = done.tag
                give(index, self.result(loaded, done, settings, before))
            yield
        yield  # failures may have come after the last caption

    def _job(self, settings: Settings, index: int, loaded: Loaded) -> Job:
        """Raises ImageError for pixels of a size that the encoder does not take."""
        size, (height, width) = loaded.pixels.shape[:2], self.model.size
        if size != self.model.size:
            raise ImageError(
                "shape",
                f"the processor leaves it {size[1]}x{size[0]} and the model takes {width}x{height}; resize it before, or let "
                "preprocessor_config.json do so",
            )
        return Job(
            (index, replace(loaded, pixels=loaded.pixels[:0])),
            loaded.pixels,
            noise.key(settings.seed, loaded.name),
            loaded.question,
        )

    def result(self, loaded: Loaded, done: Finished, settings: Settings, before: tuple[int, ...] = ()) -> Result:
        """What was said of an image, as text."""
        if not done.hypotheses:
            return Failure(loaded.name, "not-finite", self._overflow())
        said = tuple(Candidate(self._text(h, settings, before), h.score) for h in done.hypotheses)
        return Caption(loaded.name, said, loaded.facts)

    def _text(self, hypothesis: Hypothesis, settings: Settings, before: tuple[int, ...]) -> str:
        ids = [*before, *(t for t in hypothesis.tokens if t not in settings.eos_token_ids)]
        if self._gaps.keys() & set(settings.question):
            text = with_gaps(self.model.tokenizer, ids, self._gaps)
        else:
            text = str(self.model.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return UNSPACED.sub("", text) if self.model.spaced else text

    def _bytes_per_slot(self, settings: Settings) -> int:
        """What a slot holds: its memory, its pool, and a step's logits several times over in float32."""
        height, width = self.model.size
        with torch.inference_mode():
            held = self.model.runtime.slot_bytes(np.zeros((1, height, width, 3), np.uint8), settings)
        return held + 16 * settings.rows * self.model.vocabulary

    def _overflow(self) -> str:
        cure = "its weights may be damaged" if self.model.dtype == "float32" else "try --dtype float32"
        return f"its numbers overflow in the model (NaN or infinity); {cure}"

    def _prepare(self, index: int, image: ImageLike, max_pixels: int, questions: Sequence[tuple[int, ...]]) -> Loaded:
        question = questions[index] if questions else ()
        if isinstance(image, str | os.PathLike):
            path = os.fsdecode(image)
            return Loaded(path, pixels.load(path, self.model.spec, max_pixels=max_pixels)[0], question=question)
        if not isinstance(image, Image.Image | np.ndarray):
            raise ImageError(
                "unreadable", f"a {type(image).__name__} is no image: a path, a PIL image or an array is one"
            )
        rgb = pixels.to_rgb(image) if isinstance(image, Image.Image) else pixels.from_array(image)
        return Loaded(str(index), pixels.resize(rgb, self.model.spec), question=question)
