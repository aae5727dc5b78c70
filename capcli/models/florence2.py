"""Florence-2 (Florence2ForConditionalGeneration, Xiao et al., 2023): DaViT, and a BART that reads image tokens and a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capcli.errors import UsageError
from capcli.models import modules
from capcli.models.cross_decoders import BartStep, layer_memory

LOADER = "Florence2ForConditionalGeneration"
ENCODER, DECODER = ("model.vision_tower",), ("model.language_model",)
generation = modules.own_generation
# The prompts of the tasks without a region, as in transformers' Florence2Processor.
TASKS = {
    "<CAPTION>": "What does the image describe?",
    "<DETAILED_CAPTION>": "Describe in detail what is shown in the image.",
    "<MORE_DETAILED_CAPTION>": "Describe with a paragraph what is shown in the image.",
    "<OCR>": "What is the text in the image?",
}
TASK = re.compile("<[A-Z_]+>")


class Encode(modules.Encode):
    """Pixels and a prompt, both through BART's encoder, to memory."""

    any_size = True

    def __init__(self, model: nn.Module, rescale: float, mean: Sequence[float], std: Sequence[float]) -> None:
        whole: Any = model
        super().__init__(whole.model.vision_tower, rescale, mean, std, size=768)
        self.project: nn.Module = whole.model.multi_modal_projector
        self.reader: Any = whole.model.language_model

    def forward(self, pixels: Tensor, encoder_ids: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """uint8 [E, h, w, 3] and the prompts' ids [E, W] -> 2 x layers of [E, H, image tokens + W, D]."""
        image = self.project(self.encoder(self.normalise(pixels)).last_hidden_state)
        text = self.reader.get_input_embeddings()(encoder_ids)
        return self.keys_values(self.reader.encoder(inputs_embeds=torch.cat((image, text), 1)).last_hidden_state)

    def keys_values(self, features: Tensor) -> tuple[Tensor, ...]:
        return tuple(t for layer in self.reader.decoder.layers for t in layer_memory(layer.encoder_attn, features))


class Step(BartStep):
    """One pass of BART's decoder."""

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        super().__init__(whole.model.language_model.decoder, whole.lm_head, whole.config.text_config)


def encoder_prompt(_config: Mapping[str, Any], tokenizer: Any, prompt: str | None) -> list[int]:
    """The ids of a task such as <CAPTION>, which is the default, or of any other text.

    Raises UsageError for a task whose result is not a caption.
    """
    if prompt:
        refuse_prompt(prompt)
    text = TASKS.get(prompt or "<CAPTION>", prompt)
    ids: list[int] = tokenizer(f"{tokenizer.bos_token}{text}{tokenizer.eos_token}", add_special_tokens=False)[
        "input_ids"
    ]
    return ids


def refuse_prompt(prompt: str) -> None:
    """Raises UsageError for a task whose result is not a caption."""
    if TASK.fullmatch(prompt) and prompt not in TASKS:
        raise UsageError(f"--prompt {prompt} is not a captioning task; these are: {', '.join(TASKS)}")


def inputs(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The forward's arguments: placeholders for the image tokens precede the prompt."""
    pixels, encoder_ids = batch["pixel_values"], batch["encoder_ids"]
    placeholders = encoder_ids.new_full(
        (len(encoder_ids), image_tokens(model.config.vision_config, *pixels.shape[2:])), 1
    ).bool()
    present = torch.cat((placeholders, encoder_ids >= 0), 1)
    ids = torch.cat((placeholders * model.config.image_token_id, encoder_ids.clamp(min=0)), 1)
    read = {"input_ids": ids, "attention_mask": present.long(), "decoder_input_ids": batch["decoder_input_ids"]}
    return {"pixel_values": pixels, **read, "use_cache": False}


def image_tokens(vision: Any, height: int, width: int) -> int:
    """The number of image tokens: one for the whole image and one per patch of DaViT's last stage."""
    for size, stride, padding in zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True):
        height, width = ((side + 2 * padding - size) // stride + 1 for side in (height, width))
    return 1 + height * width


def prompt_inputs(config: Any, tokenizer: Any, prompt: str | None, size: tuple[int, int]) -> dict[str, list[int]]:
    """The task for `generate()`, after a placeholder for each image token of pixels [height, width] = `size`."""
    ids = encoder_prompt(config.to_dict(), tokenizer, prompt)
    return {"input_ids": [config.image_token_id] * image_tokens(config.vision_config, *size) + ids}
