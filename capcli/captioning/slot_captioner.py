"""The slots backend's captioner: a model of a family in capcli.models, on the decode loop. Loaded images in, captions out."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from capcli import pixels
from capcli.captioning.feed import ArrivalFeed, Arrivals, Deliver, LocalArrivals, OrderedDelivery, Result
from capcli.captioning.model import Model
from capcli.decoding import noise
from capcli.decoding.activity import Activity
from capcli.decoding.loop import Finished, Job
from capcli.decoding.parallel import decode_in_parallel
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import NO_TOKEN, Settings, resolve
from capcli.decoding.shapes import Shapes, fitting_slots, useful_slots
from capcli.errors import CapcliError, ImageError, UsageError
from capcli.models.checkpoint import quiet_transformers
from capcli.models.document_text import FieldDecoder
from capcli.models.encoder_text import gap_names, tag_ids, with_gaps
from capcli.models.families import with_start
from capcli.models.model_files import ModelFiles
from capcli.options import MAX_PIXELS, GenerationOptions
from capcli.records import Candidate, Caption, Failure, Loaded
from capcli.text import is_text, printable, tag_text

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[np.generic]
# CJK ideographs, kana, CJK punctuation and full-width forms: a space between two of these comes from the tokenizer.
WIDE = "[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]"
UNSPACED = re.compile(f"(?<={WIDE}) (?={WIDE})")


class SlotCaptioner:
    """Captions loaded images with one model. Use it from one thread at a time."""

    def __init__(self, model: Model, files: ModelFiles) -> None:
        self.model, self.files = model, files
        self._gaps = gap_names(model.tokenizer) if model.encoder_prompt else {}
        self._fields = FieldDecoder.of(model.tokenizer)

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
        """As `Captioner.caption`. Raises UsageError at once for settings and tags that the model does not take."""
        settings = self.settings(options, prompt)
        load = partial(self._load, max_pixels=max_pixels, tags=self._tag_ids(tags, images))
        return self._captions(images, load, settings, keep_prompt, batch_size)

    def _captions(
        self,
        images: Iterable[ImageLike],
        load: Callable[[int, ImageLike], Loaded],
        settings: Settings,
        keep_prompt: bool,
        batch_size: int | None,
    ) -> Iterator[Result]:
        shapes = self.shapes(settings, len(images) if isinstance(images, Sized) else None, batch_size)
        ready: deque[Result] = deque()

        def deliver(_: int, result: Result) -> None:
            ready.append(result)

        for _ in self.run(LocalArrivals(images, load), settings, shapes, deliver, keep_prompt=keep_prompt):
            while ready:
                yield ready.popleft()

    def run(
        self,
        arrivals: Arrivals,
        settings: Settings,
        shapes: Shapes,
        deliver: Deliver,
        *,
        ordered: bool = True,
        keep_prompt: bool = False,
        stop: Callable[[], bool] = lambda: False,
        on_shrink: Callable[[Shapes], None] = lambda _: None,
        activity: Activity | None = None,
    ) -> Iterator[None]:
        """Caption all arrivals. `deliver(index, result)` is called for each, in the order of arrival if `ordered`.

        This is a generator that yields after every decoding step, so that the caller can show progress or end the run.
        Once `stop()` is true, no more images are taken, and those in the batch are finished. `on_shrink` is called with
        the new shapes when device memory ran out and the run continues with fewer slots. `activity` is kept up to date.
        """
        give = OrderedDelivery(deliver).put if ordered else deliver
        kept = settings.prompt[1:] if keep_prompt else ()  # without the start token
        feed = ArrivalFeed(arrivals, partial(self._job, settings), give, stop)
        runtimes = self.model.runtime.replicas(shapes.loops)
        steps = decode_in_parallel(feed, runtimes, settings, shapes, on_shrink, activity)
        yield from delivered(steps, lambda loaded, done: self.result(loaded, done, settings, kept), give)

    def settings(self, options: GenerationOptions, prompt: str | None = None) -> Settings:
        """The search settings: `options`, with the checkpoint's generation_config for those that are None.

        Raises UsageError and CapcliError for settings that this model cannot run with.
        """
        model = self.model
        ids = self._prompt_ids(prompt)
        if model.encoder_prompt:
            settings = resolve(model.generation, options)
        else:
            settings = resolve(with_start(self.files.config, model.generation, ids), options, ids)
        if model.encoder_prompt:
            settings = replace(settings, encoder_ids=tuple(ids))
        elif model.tag_tokens:  # for images without tags
            settings = replace(settings, encoder_ids=(NO_TOKEN,) * model.tag_tokens)
        room = model.positions - len(settings.prompt) + 1  # the last token is never an input of the decoder
        if room < 1:
            raise UsageError(
                f"the prompt has {len(settings.prompt)} tokens and the decoder accepts at most {model.positions}: shorten it"
            )
        if settings.max_new_tokens > room:
            raise UsageError(
                f"--max-new-tokens is {settings.max_new_tokens}, but the decoder accepts {model.positions} tokens, "
                f"including the prompt: give at most {room}"
            )
        self._check_ids(settings)
        return settings

    def _prompt_ids(self, prompt: str | None) -> list[int]:
        if prompt and not is_text(prompt):
            raise UsageError(f"the prompt {printable(prompt)} is not UTF-8")
        with quiet_transformers():
            if self.model.encoder_prompt:
                return self.model.encoder_prompt(self.model.tokenizer, prompt)
            if not prompt:
                return []
            ids: list[int] = self.model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        return ids

    def _check_ids(self, settings: Settings) -> None:
        """Raises CapcliError for token ids outside the decoder's vocabulary."""
        s = settings
        forced = () if s.forced_bos_token_id is None else (s.forced_bos_token_id,)
        named = {"the prompt": (*s.prompt, *s.encoder_ids), "forced tokens": (*forced, *s.forced_eos_token_ids)}
        named |= {"suppressed tokens": (*s.suppress_tokens, *s.begin_suppress_tokens)}
        named |= {"bad_words_ids": tuple(chain(*s.bad_words_ids))}
        named |= {"the end token, with min_new_tokens": s.eos_token_ids if s.min_new_tokens else ()}
        for what, ids in named.items():
            unknown = [i for i in ids if not 0 <= i < self.model.vocabulary and i != NO_TOKEN]
            if unknown:
                raise CapcliError(
                    f"{what}: token {unknown[0]} is outside the decoder's vocabulary of {self.model.vocabulary}: the "
                    "tokenizer or the generation_config may belong to another model"
                )

    def _tag_ids(self, tags: Sequence[str | None] | None, images: Iterable[ImageLike]) -> list[tuple[int, ...]]:
        """For each image the ids of its tags, which the encoder reads; empty where no tags are given."""
        if tags is None:
            return []
        if isinstance(tags, str) or not isinstance(tags, Sequence):
            raise TypeError("tags must be a list with a text or None for each image")
        if other := [tag for tag in tags if not isinstance(tag, str | None)]:
            raise TypeError(f"tags contain a {type(other[0]).__name__}: each must be a text or None")
        if not isinstance(images, Sized):
            raise TypeError("with tags, put the images into a list: there must be one text per image")
        if not self.model.tag_tokens:
            raise UsageError(f"{self.files.name} reads no tags: leave them out")
        if len(tags) != len(images):
            raise UsageError(f"there are {len(tags)} tags and {len(images)} images: give a text or None for each image")
        if wrong := [tag for tag in tags if tag and not is_text(tag)]:
            raise UsageError(f"the tags {printable(wrong[0])} are not UTF-8")
        return tag_ids(self.model.tokenizer, [tag_text(tag) for tag in tags], self.model.tag_tokens)

    def shapes(self, settings: Settings, count: int | None, batch_size: int | None = None, loops: int = 1) -> Shapes:
        """The slots and the chunk of each of `loops` decode loops.

        `count` is the number of images, None where it is unknown or larger than any batch. `batch_size` is for all loops
        together; None: as many slots as are worthwhile and fit into device memory. Raises UsageError where an engine was
        not built for the batch.
        """
        runtime = self.model.runtime
        images = None if count is None else math.ceil(count / loops)  # per loop
        if batch_size is None:
            most = fitting_slots(runtime.device, self._bytes_per_slot(settings)) // loops
            shapes = runtime.shapes(useful_slots(runtime.device, settings), settings, max(1, most), images)
        else:
            slots = batch_size // loops
            shapes = runtime.shapes(slots, settings)
            if images is not None and images < slots:
                shapes = runtime.shapes(max(1, images), settings)
        return replace(shapes, loops=loops)

    def _bytes_per_slot(self, settings: Settings) -> int:
        """Device memory of a slot: cross-attention memory, pool, and several copies of a step's logits in float32."""
        height, width = self.model.size
        with torch.inference_mode():
            size = self.model.runtime.slot_bytes(np.zeros((1, height, width, 3), np.uint8), settings)
        return size + 16 * settings.rows * self.model.vocabulary

    def _load(self, index: int, image: ImageLike, max_pixels: int, tags: Sequence[tuple[int, ...]]) -> Loaded:
        spec = self.model.spec
        read = partial(pixels.load, spec=spec, max_pixels=max_pixels)
        loaded = load_image(index, image, read=lambda path: read(path)[0], resize=lambda rgb: pixels.resize(rgb, spec))
        return replace(loaded, encoder_ids=tags[index] if tags else ())

    def _job(self, settings: Settings, index: int, loaded: Loaded) -> Job:
        """Raises ImageError for pixels of a size that the encoder does not take."""
        size, (height, width) = loaded.pixels.shape[:2], self.model.size
        if size != self.model.size:
            raise ImageError(
                "shape",
                f"after preprocessing it is {size[1]}x{size[0]} and the model takes {width}x{height}: resize the image, or "
                "set do_resize in preprocessor_config.json",
            )
        without_pixels = replace(loaded, pixels=loaded.pixels[:0])
        noise_key = noise.key(settings.seed, loaded.name)
        return Job((index, without_pixels), loaded.pixels, noise_key, loaded.encoder_ids)

    def result(self, loaded: Loaded, done: Finished, settings: Settings, kept: tuple[int, ...] = ()) -> Result:
        """The captions of an image as text; `kept` are tokens of the prompt that come before each."""
        if not done.hypotheses:
            return overflow(loaded.name, self.model.dtype)
        candidates = tuple(Candidate(self._text(h, settings, kept), h.score) for h in done.hypotheses)
        return Caption(loaded.name, candidates, loaded.facts)

    def _text(self, hypothesis: Hypothesis, settings: Settings, kept: tuple[int, ...]) -> str:
        tokens = [t for t in hypothesis.tokens if t not in settings.eos_token_ids]
        ids = [*kept, *tokens]
        # a prompt may begin the field whose value is the caption
        if self._fields and (fields := self._fields.json((*settings.prompt[1:], *tokens))):
            return fields
        if self._gaps.keys() & set(settings.encoder_ids):
            text = with_gaps(self.model.tokenizer, ids, self._gaps)
            return UNSPACED.sub("", text) if self.model.spaced else text
        return caption_text(self.model.tokenizer, ids, spaced=self.model.spaced)


def delivered(
    steps: Iterable[list[Finished]], result: Callable[[Loaded, Finished], Result], give: Deliver
) -> Iterator[None]:
    """Gives the results of all steps of a decode loop, whose jobs have the tags (index, image); yields after every step."""
    for ended in steps:
        for done in ended:
            index, loaded = done.tag
            give(index, result(loaded, done))
        yield
    yield  # failures may have been delivered after the last caption


def overflow(name: str, dtype: str) -> Failure:
    """The failure of an image whose caption has no finite score."""
    advice = "its weights may be damaged" if dtype == "float32" else "try --dtype float32"
    return Failure(name, "not-finite", f"its values overflow in the model (NaN or infinity); {advice}")


def caption_text(tokenizer: Any, ids: Sequence[int], *, spaced: bool) -> str:
    """The text of a caption's tokens without special ones. `spaced` tokenizers put a space between Chinese characters."""
    text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return UNSPACED.sub("", text) if spaced else text


def load_image(
    index: int,
    image: ImageLike,
    *,
    read: Callable[[str | bytes], npt.NDArray[np.uint8]],
    resize: Callable[[Image.Image], npt.NDArray[np.uint8]],
) -> Loaded:
    """An image given to the Python API: `read` loads a path or a file's bytes, `resize` an upright RGB image.

    Raises ImageError.
    """
    if isinstance(image, str | os.PathLike):
        path = os.fsdecode(image)
        return Loaded(path, read(path))
    if (data := file_bytes(image)) is not None:
        return Loaded(str(index), read(data))
    if not isinstance(image, Image.Image | np.ndarray):
        raise ImageError(
            "unreadable",
            f"a {type(image).__name__} is not an image: give paths, bytes, binary files, PIL images or arrays",
        )
    rgb = pixels.to_rgb(image) if isinstance(image, Image.Image) else pixels.from_array(image)
    return Loaded(str(index), resize(rgb))


def file_bytes(image: object) -> bytes | None:
    """The bytes of an image file given as bytes, or as a file that is open for reading, from its current position.

    None for anything else. Raises ImageError for a file that cannot be read or is open as text.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, Image.Image) or not callable(read := getattr(image, "read", None)):
        return None
    try:
        data = read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed, or its text cannot be decoded
        raise ImageError("unreadable", f"the file cannot be read: {error}") from error
    if not isinstance(data, bytes):
        raise ImageError("unreadable", "the file is open as text: open it with mode 'rb'")
    return data
