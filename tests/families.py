"""Random captioners of the families beside vision-encoder-decoder, small enough to make in a test, whose captions end."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from captioners import SIZE, pictures, values
from running import PROCESSOR, VOCABULARY, save_words
from transformers import BlipConfig, BlipForConditionalGeneration, GitConfig, GitForCausalLM, PreTrainedModel

PAD, START, END = VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": START,
    "pad_token_id": PAD,
}
VISION = {
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": 8,
}


def blip() -> PreTrainedModel:
    text = TEXT | {"encoder_hidden_size": 40, "sep_token_id": END, "eos_token_id": 2, "projection_dim": 32}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION, projection_dim=32))


def git() -> PreTrainedModel:
    return GitForCausalLM(GitConfig(vision_config=VISION, eos_token_id=END, **TEXT))


FAMILIES = {"blip": blip, "git": git}


@cache
def random_of_family(family: str, seed: int = 0, ends: float = 0.2) -> Any:
    """With large random weights in float64; `ends` is the share of steps at which greedy decoding ends."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval().double()
    for name, weight in model.named_parameters():
        norm = "norm" in name.lower()
        place = "position_embedding" in name
        torch.nn.init.normal_(weight, mean=1.0 if norm and name.endswith("weight") else 0.0, std=1.0 if place else 0.3)
    make_end(model, ends)
    return model


@torch.inference_mode()
def make_end(model: Any, share: float) -> None:
    """Lifts the end token's bias so that it is said at this share of the steps."""
    head = model.text_decoder.get_output_embeddings() if hasattr(model, "text_decoder") else model.output
    pixels = torch.cat([values(picture, torch.float64) for picture in pictures(24, seed=99)])
    out = model.generate(
        pixel_values=pixels, max_new_tokens=12, suppress_tokens=[END], output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(out.logits)
    lead = logits.index_fill(-1, torch.tensor([END]), -torch.inf).amax(-1) - logits[..., END]
    head.bias[END] += lead.quantile(share)


PROCESSORS: dict[str, dict[str, Any]] = {
    "blip": {"image_processor_type": "BlipImageProcessor"},
    "git": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
    },
}


def save_family(folder: Path, family: str) -> Path:
    """A whole random captioner of a family, in float32."""
    copy.deepcopy(random_of_family(family)).float().save_pretrained(folder)
    save_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | PROCESSORS[family]))
    return folder
