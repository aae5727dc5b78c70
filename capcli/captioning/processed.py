"""Images and prompts that pass through a transformers processor: in the generate backend, and for VLMs in slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor

from capcli import pixels
from capcli.captioning.answers import without_reasoning
from capcli.captioning.prompts import Prompts
from capcli.captioning.slot_captioner import ImageLike, caption_text, load_image
from capcli.errors import ImageError
from capcli.models.auto import AutoModel, load_processor, processor_inputs, writer
from capcli.models.checkpoint import quiet_transformers
from capcli.models.model_files import ModelFiles
from capcli.records import Facts, Loaded

MAX_NEW_TOKENS = 128  # where neither options nor model state it: generate()'s own default of 20 cuts sentences off
HOPELESS = 3  # images in a row that the model itself cannot process, and none before them: then the run ends
Inputs = Mapping[str, Tensor]
MakeInputs = Callable[[Any, str | None, str | None], Inputs]  # of an image, its prompt and the system prompt


@dataclass(frozen=True)
class Given:
    """What the model is given beside the image. `max_edge` bounds the image's longest edge in pixels; None: no bound.

    With `prompts` each image has a prompt of its own.
    """

    prompt: str | None = None
    system: str | None = None
    max_edge: int | None = None
    keep_prompt: bool = False
    prompts: Prompts | None = None

    def prompt_of(self, prepared: str | None) -> str | None:
        """The prompt of an image whose entry has `prepared`. Raises ImageError where its metadata lacks a value."""
        return self.prompt if self.prompts is None else self.prompts.of(prepared)

    def inputs(self, make: MakeInputs, loaded: Loaded) -> tuple[Loaded, Inputs]:
        """An image without its pixels and with its prompt, and the model's inputs for it.

        Inputs that a decoder process has made already are taken from the image. Raises ImageError.
        """
        prompt = self.prompt_of(loaded.prompt)
        packed = loaded.pixels.ndim == 1
        found = unpacked(loaded.pixels) if packed else self.made(make, loaded.pixels, prompt)
        # not a part of the pixels, which would keep all of them in memory
        return replace(loaded, pixels=np.empty(0, np.uint8), prompt=prompt), found

    def made(self, make: MakeInputs, image: Any, prompt: str | None) -> Inputs:
        """The inputs of an image, uint8 [height, width, 3]. Raises ImageError where the processor cannot take it."""
        try:
            with quiet_transformers():
                return make(image, prompt, self.system)
        except Exception as error:  # a processor may raise anything
            raise ImageError("shape", f"the model's processor cannot take it: {one_line(error)}") from error

    def kept(self, text: str, prompt: str | None) -> str:
        """A caption, after its prompt where that is wanted."""
        return f"{prompt} {text}".strip() if self.keep_prompt and prompt else text


@dataclass(frozen=True)
class ProcessedDecode:
    """Loads an image and runs the model's processor on it, in a decoder process: the tensors, packed, and the facts."""

    files: ModelFiles
    given: Given
    max_pixels: int
    facts: Collection[str]

    def __call__(self, source: str | bytes, prepared: str | None = None) -> tuple[Any, Facts]:
        """`source` is a path or a file's bytes, `prepared` the prompt of the entry. Raises ImageError."""
        prompt = self.given.prompt_of(prepared)
        image, found = pixels.load_whole(
            source, max_pixels=self.max_pixels, facts=self.facts, max_edge=self.given.max_edge
        )
        return packed(self.given.made(self._make, image, prompt)), found

    @cached_property
    def _make(self) -> MakeInputs:
        with quiet_transformers():
            processor, _ = load_processor(self.files)
        write = writer(self.files.config["model_type"], processor)
        return lambda image, prompt, system: processor_inputs(processor, image, write(prompt, system))

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def packed(inputs: Inputs) -> Any:
    """Tensors as bytes, uint8 [n], in the format of safetensors."""
    data = safetensors.torch.save({name: value.contiguous() for name, value in inputs.items()})
    return np.frombuffer(data, np.uint8)


def unpacked(data: Any) -> Inputs:
    """The tensors of `packed`."""
    return safetensors.torch.load(data.tobytes())


def whole_image(max_edge: int | None, max_pixels: int) -> Callable[[int, ImageLike], Loaded]:
    """A function that loads an image given to the Python API, by its index."""
    return partial(
        load_image,
        read=lambda path: pixels.load_whole(path, max_pixels=max_pixels, max_edge=max_edge)[0],
        resize=lambda rgb: np.array(pixels.within(rgb, max_edge)),
    )


def answer_text(auto: AutoModel, ids: Sequence[int]) -> str:
    """The text of an answer's tokens, without special tokens, reasoning and Kosmos-2's groundings."""
    text = caption_text(auto.tokenizer, ids, spaced=False)
    clean = getattr(auto.processor, "clean_text_and_extract_entities_with_bboxes", None)
    if clean is not None:
        text = str(clean(text)[0]).strip()
    return without_reasoning(text)


def one_line(error: BaseException) -> str:
    """An exception as one line of text."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
