"""The model families: which module of this folder implements a model, by the `model_type` of its config.json.

A family's module maps transformers' model onto two modules, encode and step (capcli.models.modules). A new family is
one file here and one line in FILES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Protocol, cast

from torch import Tensor, nn

from capcli.models.encoders import unused_names
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
    """The interface of a family's module.

    Three functions are optional. A family whose encoder, not its decoder, reads the prompt has
    `encoder_prompt(config, tokenizer, prompt)`, which returns the prompt's token ids. `refuse_prompt(prompt)` raises
    UsageError for a prompt that the family cannot use, before any weights are read. `prompt_has_start(config)` is whether
    a prompt for the decoder begins with a start token of its own, in place of the model's.
    """

    LOADER: str  # the name of transformers' class that loads the weights
    Encode: Callable[[nn.Module, float, Sequence[float], Sequence[float]], Encode]  # model, rescale, mean, std
    Step: Callable[[nn.Module], Step]
    ENCODER: tuple[str, ...]  # names of the vision encoder's submodules
    # Names of the text decoder's submodules, the one with the embeddings first; projections are in neither.
    DECODER: tuple[str, ...]

    def generation(self, config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """The generation settings where the user gives none, from config.json and the model's generation_config `own`."""

    def inputs(self, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the model's forward for a training batch; its last T logits are those of the T labels.

        A batch holds pixel_values [B, 3, h, w], decoder_input_ids [B, T] and, where the encoder reads text, encoder_ids
        [B, W], which are IGNORED where there is no token.
        """

    def prompt_inputs(
        self, config: Any, tokenizer: Any, prompt: str | None, size: tuple[int, int]
    ) -> dict[str, list[int]]:
        """The ids that transformers' `generate()` takes for a prompt (None: none, or the model's own), by argument.

        `config` is the model's config, `size` the height and width of its pixels.
        """


IGNORED = -100  # in a training batch: no token at this position


def last_logits(out: Any, count: int) -> Tensor:
    """The logits [B, count, V] of a caption's tokens; those of image tokens may precede them."""
    logits: Tensor = out.logits[:, -count:]
    return logits


def encoder_prompt_of(config: Mapping[str, Any]) -> Callable[[Any, str | None], list[int]] | None:
    """A function from a tokenizer and a prompt (None: the model's own) to the ids that the encoder reads.

    None for a family whose encoder reads no prompt.
    """
    ids = getattr(family_of(config), "encoder_prompt", None)
    return None if ids is None else partial(ids, config)


def with_start(config: Mapping[str, Any], generation: Mapping[str, Any], prompt: Sequence[int]) -> dict[str, Any]:
    """`generation` for a prompt's ids: their first is the start token where prompts begin with their own."""
    has_start = getattr(family_of(config), "prompt_has_start", None)
    own = {"decoder_start_token_id": prompt[0]} if prompt and has_start is not None and has_start(config) else {}
    return {**generation, **own}


def tag_room(config: Mapping[str, Any]) -> int:
    """The most tokens of an image's tags that the encoder reads; 0 where it reads no tags."""
    return int(config.get("tag_tokens") or 0)


def unused_weights(model: Any) -> frozenset[str]:
    """The names of a model's weights that captions do not depend on, such as an encoder's pooler: they are never trained."""
    parts = dict(model.named_modules())
    encoders = {name: parts[name] for name in family_of(model.config.to_dict()).ENCODER if name in parts}
    return frozenset(f"{name}.{unused}" for name, part in encoders.items() for unused in unused_names(part))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json whose `model_type` is in FILES."""
    return cast("Family", import_module(f"capcli.models.{FILES[config['model_type']]}"))
