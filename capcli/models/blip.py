"""BLIP (BlipForConditionalGeneration, Li et al., 2022): a ViT, and a BERT-like text decoder with cross-attention.

The decoder's attention cannot be chosen in transformers, so `use_attention` has no effect on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import BlipTextConfig, GenerationConfig

from capcli.models import modules
from capcli.models.modules import split_heads

LOADER = "BlipForConditionalGeneration"
ENCODER, DECODER = ("vision_model",), ("text_decoder",)
inputs = modules.decoder_only_inputs


class Encode(modules.Encode):
    """Pixels to memory."""

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.vision_model, rescale, mean, std)
        self.decoder: Any = whole.text_decoder

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        layers = [layer.crossattention.self for layer in self.decoder.bert.encoder.layer]
        return tuple(
            split_heads(project(features), layer.num_attention_heads)
            for layer in layers
            for project in (layer.key, layer.value)
        )


class Step(modules.CrossStep):
    """One pass of the text decoder."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.text_decoder)
        config = whole.config.text_config
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size


def generation(config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
    """The text decoder's settings with its own end and padding ids, as BLIP's generate(); generation_config.json is not read."""
    text = BlipTextConfig(**config.get("text_config") or {})
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}
    return GenerationConfig.from_model_config(text).to_dict() | ids | {"decoder_start_token_id": text.bos_token_id}


def prompt_inputs(_config: Any, tokenizer: Any, prompt: str | None, _size: tuple[int, int]) -> dict[str, list[int]]:
    """The prompt for `generate()`, which replaces the first id by its start token and leaves out the last."""
    ids = modules.plain_ids(tokenizer, prompt)
    return {"input_ids": [0, *ids, 0]} if ids else {}
