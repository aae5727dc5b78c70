"""A vision-language model with an adapter to train, and the texts that it reads and learns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from capcli.captioning.processed import Given
from capcli.captioning.vlm_captioner import VlmCaptioner
from capcli.errors import UsageError
from capcli.models.auto import AutoModel, answer_text_after, load_auto
from capcli.models.model_files import ModelFiles
from capcli.options import TrainOptions
from capcli.training.model.lora import add_lora
from capcli.training.model.tokenizers import SpecialTokens, special_tokens

TAGS = "{tags}"
MAX_LENGTH = 256  # tokens of a caption: those of such models are longer than DEFAULT_LENGTH


@dataclass(frozen=True, slots=True)
class AssembledVlm:
    """A vision-language model before training, in float32 and in eval mode.

    `model` is `auto.model` with an adapter; both share all modules. `given` is what the model reads beside an image: its prompt
    may contain TAGS. `ends` are the ids that end a caption, the first of which it learns. The other fields are as in
    AssembledCaptioner.
    """

    model: Any
    auto: AutoModel
    files: ModelFiles
    given: Given
    specials: SpecialTokens
    ends: tuple[int, ...]
    max_length: int
    notes: tuple[str, ...]
    new: frozenset[str] = frozenset()

    @property
    def tokenizer(self) -> Any:
        return self.auto.tokenizer

    @property
    def processor(self) -> dict[str, Any]:
        """An adapter is saved without the settings of a processor, which are those of its base model."""
        return {}

    def prompt(self, tags: str) -> str | None:
        """The prompt of an image with these tags."""
        return None if self.given.prompt is None else self.given.prompt.replace(TAGS, tags)

    def answer_ids(self, caption: str, tags: str) -> list[int]:
        """The ids of a caption as the model is to write it, with its end token; at most `max_length`."""
        text = answer_text_after(self.auto, self.prompt(tags), self.given.system, caption)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = next((n for n, token in enumerate(ids) if token in self.ends), None)
        whole = [*ids, self.specials.end] if end is None else ids[: end + 1]
        return whole[: self.max_length]

    def captioner(self) -> VlmCaptioner:
        """A captioner with the weights of the model."""
        return VlmCaptioner(self.auto, self.files, "float32")


def assemble_vlm(options: TrainOptions, files: ModelFiles) -> AssembledVlm:
    """The model that the options name, with a new adapter. Raises UsageError and CapcliError."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # else each process that loads images warns of it after its fork
    auto = load_auto(files, "float32", torch.device("cpu"))
    model, line = add_lora(auto.model, options)
    found = auto.generation.to_dict().get("eos_token_id")
    ends = tuple(found) if isinstance(found, list) else (() if found is None else (found,))
    own = special_tokens(auto.tokenizer)
    specials = SpecialTokens(own.start, ends[0] if ends else own.end, own.pad)
    max_length = options.model.max_length or MAX_LENGTH
    if options.mask_patches:
        raise UsageError("--mask-patches is not for vision-language models: leave it out")
    given = Given(options.prompt, options.system, auto.bound_edge(None))
    return AssembledVlm(model, auto, files, given, specials, ends or (specials.end,), max_length, (line,))
