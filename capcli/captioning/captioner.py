"""The Python API: a captioner is a model with its tokenizer and image processor. Images in, captions out.

from capcli import Caption, Captioner

captioner = Captioner.load("nlpconnect/vit-gpt2-image-captioning")
for result in captioner.caption(["beach.jpg", "dog.png"], num_beams=4):
    if isinstance(result, Caption):  # else a Failure
        print(result.name, result.text, result.score)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from capcli.captioning.feed import Result
from capcli.captioning.generate_captioner import load_generate
from capcli.captioning.model import choose_dtype, device_of, find_any_model, load_model
from capcli.captioning.slot_captioner import ImageLike, SlotCaptioner
from capcli.captioning.vlm_captioner import load_vlm
from capcli.engine.engine_json import engine_of
from capcli.errors import UsageError
from capcli.models.dtypes import choose_device
from capcli.models.model_files import has_family, is_vlm
from capcli.options import DEFAULT_MODEL, MAX_PIXELS, GenerationOptions

ONE_IMAGE = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image, np.ndarray)


class Core(Protocol):
    """What a captioner consists of: a model on one of the backends."""

    def caption(
        self,
        images: Iterable[ImageLike],
        options: GenerationOptions,
        *,
        prompt: str | None,
        keep_prompt: bool,
        tags: Sequence[str | None] | None,
        batch_size: int | None,
        max_pixels: int,
    ) -> Iterator[Result]:
        """One result per image, in order. Raises UsageError at once for options that the model does not take."""


class Captioner:
    """Captions images with one model. Use it from one thread at a time."""

    def __init__(self, core: Core) -> None:
        self.core = core

    @classmethod
    def load(
        cls,
        model: str = DEFAULT_MODEL,
        *,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: Literal["auto", "slots", "generate"] = "auto",
        adapter: str | None = None,
    ) -> Captioner:
        """Load a captioner from a folder or the hub, with the LoRA `adapter` merged into it; `model` may be an adapter itself.

        `device` is `auto`, `cpu`, `cuda[:n]` or `mps`. `dtype` is `auto` (bfloat16 where the hardware computes in it),
        `float32`, `bfloat16`, `float16` or, on CPUs, `int8`. `backend` is `slots` (capcli's decode loop), `generate`
        (transformers' own `generate()`, for any model that it loads), or `auto`: slots where it has a family for the model.
        Raises UsageError for invalid arguments, and CapcliError where the model cannot be downloaded, read or run.
        """
        choose_device(device)  # raises UsageError before anything is downloaded
        files = find_any_model(model, revision, backend, adapter=adapter, quiet=True)
        if backend == "generate" or not (files.is_engine or has_family(files.config)):
            place = choose_device(device)
            in_slots = backend != "generate" and place.type != "mps" and is_vlm(files.config)
            return cls((load_vlm if in_slots else load_generate)(files, choose_dtype(dtype, place), place))
        engine = engine_of(files)
        chosen = device_of(device, engine)
        return cls(SlotCaptioner(load_model(files, engine, chosen, choose_dtype(dtype, chosen, engine)), files))

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
        """Caption `images`: paths, the bytes of image files, files open for reading in binary mode, PIL images of any mode, or
        arrays [height, width] or [height, width, 1, 3 or 4].

        Arrays are uint8, uint16, or floats from 0 to 1. Images are read only when the batch has room for them.

        Yields one `Caption` or `Failure` per image, in order; an image that cannot be read is a failure and never raises.
        The `name` is the path, or the index of an image that has none.

        `generation` has the names of transformers' GenerationConfig: num_beams, max_new_tokens, min_new_tokens,
        length_penalty, early_stopping, no_repeat_ngram_size, repetition_penalty, do_sample, temperature, top_k, top_p,
        num_return_sequences, seed, suppress_tokens, begin_suppress_tokens, bad_words_ids. `prompt` is given to the decoder
        before the caption, or to an encoder that reads questions; `keep_prompt` leaves it in the text. `tags` are for a
        captioner that reads tags: for each image a text such as `[dog] [beach]`, or None. `batch_size` is the number of
        images decoded at once (None: chosen for the device).

        Raises at once TypeError for an unknown setting, a single image, and tags that are not a list of texts;
        UsageError for invalid values, and for tags that the captioner does not read or that are not one per image. At the
        first image, raises UsageError where an engine was not built for the batch size.
        """
        if isinstance(images, ONE_IMAGE) or hasattr(images, "read"):
            raise TypeError("caption() takes several images: put a single one into a list")
        unknown = [name for name in generation if name not in GenerationOptions.__dataclass_fields__]
        if unknown:
            known = ", ".join(GenerationOptions.__dataclass_fields__)
            raise TypeError(f"caption() has no setting {', '.join(unknown)}; it has {known}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
        return self.core.caption(
            images,
            GenerationOptions(**generation),
            prompt=prompt,
            keep_prompt=keep_prompt,
            tags=tags,
            batch_size=batch_size,
            max_pixels=max_pixels,
        )
