"""The families of captioners: which file of this folder knows a model, by the `model_type` of its config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn

from capcli.models.modules import Encode, Step

FILES = {
    "vision-encoder-decoder": "vision_encoder_decoder",
    "blip": "blip",
    "git": "git",
    "florence2": "florence2",
    "prefix-captioner": "prefix",
    "vision-t5": "vision_t5",
}


class Family(Protocol):
    """What a family's file holds."""

    LOADER: str  # transformers' class
    Encode: Callable[[nn.Module, float, Sequence[float], Sequence[float]], Encode]
    Step: Callable[[nn.Module], Step]
    ENCODER: tuple[str, ...]  # the sub-modules that see
    DECODER: tuple[str, ...]  # those that speak, the one with the embeddings first; what joins them is in neither

    def generation(self, config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """The generation settings in force where the user says nothing: of config.json and the model's own."""

    def inputs(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model's forward takes of a batch to learn from, so that its last T logits are those of the T labels.

        A batch holds pixel_values, decoder_input_ids [B, T] and, where there is one, question [B, W], IGNORED where no word is.
        """

    # `question(config, tokenizer, prompt)`, the ids that a prompt becomes, is there where the encoder is asked, not the decoder,
    # and `refuse_prompt(prompt)` where it says before any weights are read that one cannot be.


IGNORED = -100  # where a batch holds no word


def last_logits(out: Any, count: int) -> Tensor:
    """The logits [B, count, V] of a caption's tokens: an image's may stand before them."""
    logits: Tensor = out.logits[:, -count:]
    return logits


def question_of(config: Mapping[str, Any]) -> Callable[[Any, str | None], list[int]] | None:
    """How a tokenizer makes ids of what the encoder is asked: a prompt, or its own question. None: it is asked nothing."""
    ask = getattr(family_of(config), "question", None)
    return None if ask is None else partial(ask, config)


def tag_room(config: Mapping[str, Any]) -> int:
    """How many words on an image (tags) its encoder reads at most; 0 where it reads none."""
    return int(config.get("tag_tokens") or 0)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json that `capcli.models.model_files` lets through."""
    return cast("Family", import_module(f"capcli.models.{FILES[config['model_type']]}"))
