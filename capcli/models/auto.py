"""Any captioner that transformers loads: its model, its processor, and the inputs of `generate()` for an image and a prompt.

Nothing is run that a model brings with it: remote code stays off, and weights in pickle are read by PyTorch's safe loader.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from capcli.errors import CapcliError
from capcli.models.adapters import merged
from capcli.models.checkpoint import explained, load_tokenizer, quiet_transformers, refuse_missing
from capcli.models.dtypes import DTYPES
from capcli.models.families import FILES, family_of
from capcli.models.model_files import (
    CONFIG,
    WEIGHTS,
    IncompleteError,
    ModelFiles,
    ModelListing,
    check_architecture,
    processor_of,
    weight_files,
)

IMAGE_TO_TEXT: Mapping[str, Any] = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES  # classes by model_type
PromptIds = Callable[[str | None, tuple[int, int]], dict[str, list[int]]]  # of a prompt and pixels [height, width]
TEXT_SUFFIXES = (".json", ".jinja", ".model", ".txt")  # of settings, templates and vocabularies
NOT_READ = ("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")
CHAT_PROMPT = "Describe this image in one sentence."
LARGEST_EDGE = 1024  # of images for a model whose image tokens grow with the image without a bound of its own
# What a model without a chat template reads beside the image, by model_type: the text around the prompt, and its default.
TEXTS: Mapping[str, tuple[str, str | None]] = {
    "blip-2": ("{prompt}", None),
    "instructblip": ("{prompt}", "Write a short description for the image."),
    "kosmos-2": ("<grounding>{prompt}", "An image of"),
    "paligemma": ("<image>{prompt}", "caption en"),
    "pix2struct": ("{prompt}", None),
}


def generates(config: Mapping[str, Any]) -> bool:
    """Whether transformers has a class that generates text from images for a config.json."""
    kind = str(config.get("model_type"))
    return kind in IMAGE_TO_TEXT or kind in FILES


@dataclass(frozen=True)
class AutoModel:
    """A transformers model with its processor, ready to generate.

    `write` turns a prompt (None: the model's own default) and a system prompt into the processor's text, None for a model
    that reads no text. `prompt_ids` gives a prompt's ids by the name of generate()'s argument, for the families of
    capcli.models, which have no such text.
    """

    model: Any
    processor: Any
    tokenizer: Any
    write: Callable[[str | None, str | None], str | None]
    prompt_ids: PromptIds | None

    @property
    def generation(self) -> Any:
        """The model's GenerationConfig."""
        return getattr(self.model, "text_decoder", self.model).generation_config

    def inputs(self, image: Any, prompt: str | None, system: str | None = None) -> dict[str, Tensor]:
        """The arguments of `generate()` for one image, RGB uint8 [height, width, 3], each a tensor with a batch of 1.

        Raises what the processor raises for an image that it cannot take.
        """
        if self.prompt_ids is not None:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
            named = self.prompt_ids(prompt, (pixels.shape[-2], pixels.shape[-1]))
            return {"pixel_values": pixels, **{name: torch.tensor([ids]) for name, ids in named.items()}}
        return processor_inputs(self.processor, image, self.write(prompt, system))

    def bound_edge(self, given: int | None) -> int | None:
        """The longest edge of images for the processor: as `given`, else LARGEST_EDGE where the processor has no bound itself.

        A processor has one if an image of twice that size gives no more input than one of that size.
        """
        if given is not None:
            return given
        small, large = (
            sum(value.numel() for value in self.inputs(blank(edge, edge), None).values())
            for edge in (LARGEST_EDGE, 2 * LARGEST_EDGE)
        )
        return LARGEST_EDGE if large > small else None


def processor_inputs(processor: Any, image: Any, text: str | None) -> dict[str, Tensor]:
    """What a processor makes of an image, RGB uint8 [height, width, 3], and a text: tensors with a batch of 1."""
    found = processor(images=image, return_tensors="pt", **({} if text is None else {"text": text}))
    return {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "labels"}


def blank(height: int, width: int) -> Any:
    """A black image."""
    return np.zeros((height, width, 3), np.uint8)


def load_auto(files: ModelFiles, dtype: str, device: torch.device, **placed: Any) -> AutoModel:
    """Load a model and its processor from a folder. `placed` are arguments of from_pretrained: quantisation, device map.

    Raises CapcliError where they cannot be loaded, with the package that is missing.
    """
    with explained(files), quiet_transformers():
        processor, tokenizer = load_processor(files)
        kind = files.config["model_type"]
        if kind in FILES:
            loader = getattr(transformers, family_of(files.config).LOADER)
        else:
            loader = getattr(transformers, IMAGE_TO_TEXT[kind])
        model, info = loader.from_pretrained(
            files.folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True, **placed
        )
        refuse_missing(files, info)
        model = merged(model, files)
    if not placed:
        model = model.to(device)
    own = kind in FILES
    prompt_ids = family_prompt(files, model, tokenizer) if own else None
    return AutoModel(model.eval(), processor, tokenizer, writer(kind, processor), prompt_ids)


def load_processor(files: ModelFiles) -> tuple[Any, Any]:
    """The processor and the tokenizer of a folder; for a family of capcli.models the image processor alone."""
    arguments: dict[str, Any] = {"local_files_only": True, "backend": "pil"}
    if files.config["model_type"] in FILES:
        loader: Any = transformers.AutoImageProcessor
        return loader.from_pretrained(files.folder, **arguments), load_tokenizer(files)
    config = transformers.AutoConfig.from_pretrained(files.folder, local_files_only=True)
    kind: Any = PROCESSOR_MAPPING.get(type(config), None)
    processor = (transformers.AutoProcessor if kind is None else without_video(kind)).from_pretrained(
        files.folder, **arguments
    )
    if not hasattr(processor, "tokenizer"):
        raise CapcliError(f"{files.name} has no processor for images and text: download or save its files again")
    return processor, processor.tokenizer


def without_video(kind: Any) -> Any:
    """A processor class without its video processor where that cannot be loaded: it needs torchvision, images do not."""
    names = kind.get_attributes()
    if is_torchvision_available() or "video_processor" not in names:
        return kind

    class ImagesOnly(kind):  # type: ignore[misc]
        """The processor for images and text."""

        apply_chat_template = transformers.ProcessorMixin.apply_chat_template  # SmolVLM's asks the video processor

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in names if name != "video_processor"]

        @classmethod
        def _get_arguments_from_pretrained(cls, *given: Any, **settings: Any) -> list[Any]:
            parts = list(super()._get_arguments_from_pretrained(*given, **settings))
            parts.insert(names.index("video_processor"), None)
            return parts

    ImagesOnly.__name__ = kind.__name__  # transformers compares it with the name in processor_config.json
    return ImagesOnly


def writer(kind: str, processor: Any) -> Callable[[str | None, str | None], str | None]:
    """A function from a prompt and a system prompt to the text for the processor."""
    if getattr(processor, "chat_template", None):
        return lambda prompt, system: chat_text(processor, prompt or CHAT_PROMPT, system)
    image = getattr(processor, "image_token", "")
    template, default = TEXTS.get(kind, (f"{image}{{prompt}}", CHAT_PROMPT))

    def text(prompt: str | None, _system: str | None) -> str | None:
        asked = prompt or default
        return None if asked is None else template.replace("{prompt}", asked)

    return text


def chat_text(processor: Any, prompt: str, system: str | None) -> str:
    """A conversation of one image and the prompt, in the model's chat template, up to where the answer begins."""
    messages = chat_messages(prompt, system)
    return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def chat_messages(prompt: str, system: str | None) -> list[dict[str, Any]]:
    """A conversation of one image and the prompt."""
    messages: list[dict[str, Any]] = []
    if system:
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    messages.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]})
    return messages


def answer_text_after(auto: AutoModel, prompt: str | None, system: str | None, answer: str) -> str:
    """The text that follows the text of a prompt where `answer` is the answer to it: in a chat template, with its end token."""
    processor = auto.processor
    if not getattr(processor, "chat_template", None):
        return answer
    asked = chat_text(processor, prompt or CHAT_PROMPT, system)
    messages = chat_messages(prompt or CHAT_PROMPT, system)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    whole = str(processor.apply_chat_template(messages, tokenize=False))
    return whole.removeprefix(asked) if whole.startswith(asked) else answer


def family_prompt(files: ModelFiles, model: Any, tokenizer: Any) -> PromptIds:
    """A function from a prompt to the ids that `generate()` of a family in capcli.models takes."""
    return partial(family_of(files.config).prompt_inputs, model.config, tokenizer)


def collect_any(name: str, listing: ModelListing, revision: str | None) -> ModelFiles:
    """As `collect_files`, for the generate backend: all settings, templates and tokenizer files of any architecture.

    Raises IncompleteError when a file is missing, and CapcliError for an architecture that generates no text from images.
    """
    if CONFIG not in listing.names:
        raise IncompleteError(f"{listing.title} has no {CONFIG}, so it is not a model in the format of transformers.")
    config = listing.read_json(CONFIG)
    if config.get("model_type") in FILES and "auto_map" in config:
        check_architecture(name, config)  # raises for code of its own, and names the same weights without
    if not generates(config):
        raise CapcliError(not_generated(name, config))
    weights = weight_files(listing)
    if not weights:
        raise IncompleteError(f"{listing.title} lacks weights ({' or '.join(WEIGHTS)}).")
    if absent := [file for file in weights if file not in listing.names]:
        raise IncompleteError(f"{listing.title} lacks {absent[0]}, which {weights[0]} names.")
    paths = [listing.fetch(file) for file in (*text_files(listing.names), *weights)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, processor_of(listing, config))


def text_files(names: frozenset[str]) -> list[str]:
    """All files with settings, templates and vocabularies, the config first; without the indices of weights."""
    found = sorted(
        n
        for n in names
        if n.endswith(TEXT_SUFFIXES) and not n.endswith((".index.json", ".run.json")) and n not in NOT_READ
    )
    return [CONFIG, *(name for name in found if name != CONFIG)]


def not_generated(name: str, config: Mapping[str, Any]) -> str:
    """Why a model cannot caption by any backend."""
    kind = config.get("model_type") or config.get("architectures") or "no model_type"
    message = (
        f"{name} is a {kind}, which transformers {transformers.__version__} does not load as a model from image to text"
    )
    if "auto_map" in config:
        message += "; it needs its own code, which capcli never runs"
    return message
