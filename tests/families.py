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
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GenerationConfig,
    GitConfig,
    GitForCausalLM,
    GPT2Config,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    Swinv2Config,
    T5Config,
    ViTConfig,
)

from capcli.models.families import family_of
from capcli.models.prefix import PrefixCaptioner, PrefixConfig
from capcli.models.vision_t5 import VisionT5, VisionT5Config

PAD, START, END = VOCABULARY - 3, VOCABULARY - 2, VOCABULARY - 1
IMAGE, IMAGE_TOKENS = VOCABULARY - 4, 17  # Florence-2's place holder
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


def florence2() -> PreTrainedModel:
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 4,
        "projection_dim": 48,
        "max_position_embeddings": 8,
    }
    text = {
        "vocab_size": VOCABULARY,
        "d_model": 48,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 64,
        "bos_token_id": START,
        "decoder_start_token_id": START,
        "eos_token_id": END,
        "forced_eos_token_id": None,
        "pad_token_id": PAD,
    }
    config = Florence2Config(vision_config=vision, text_config=text | {"model_type": "bart"}, image_token_id=IMAGE)
    model = Florence2ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START, bos_token_id=START, eos_token_id=END, pad_token_id=PAD
    )
    return model


RESNET = {"embedding_size": 16, "hidden_sizes": [16, 24, 40], "depths": [1, 1, 2], "layer_type": "bottleneck"}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
TAGS = 4  # tag words of a tagged prefix captioner at most


def prefix(encoder: PretrainedConfig | None = None, tag_tokens: int = 0) -> PreTrainedModel:
    ids = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    text = GPT2Config(**GPT2, **ids, tie_word_embeddings=False)
    vision = encoder or ResNetConfig(**RESNET)
    model = PrefixCaptioner(PrefixConfig(vision, text, tag_tokens=tag_tokens, decoder_start_token_id=START))
    for norm in model.modules():  # statistics as of a trained one
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


def tagged() -> PreTrainedModel:
    return prefix(tag_tokens=TAGS)


T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 96,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9,  # within the length of a caption
    "decoder_start_token_id": START,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def vision_t5(encoder: PretrainedConfig | None = None) -> PreTrainedModel:
    """SwinV2, and a T5 whose head is its embeddings, so its states are scaled before it."""
    swin = Swinv2Config(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
    return VisionT5(VisionT5Config(encoder or swin, T5Config(**T5)))


def vision_t5_gated() -> PreTrainedModel:
    """ViT, a T5 v1.1 (gated, with a head of its own and no scale), and a T5 encoder for the question."""
    text = T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    reader = T5Config(**T5 | {"d_model": 32})
    model = VisionT5(VisionT5Config(ViTConfig(**VISION), text, reader))
    model.text_model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, 48))
    return model


FAMILIES = {
    "blip": blip,
    "git": git,
    "florence2": florence2,
    "prefix": prefix,
    "tagged": tagged,
    "vision-t5": vision_t5,
    "vision-t5 v1.1": vision_t5_gated,
}


def random_weights(model: PreTrainedModel) -> Any:
    """A model with large random weights in float64."""
    model = model.eval().double()
    for name, weight in model.named_parameters():
        norm = "norm" in name.lower() or ".ln_" in name
        place = any(sign in name for sign in ("position_embedding", "wpe", "relative_attention_bias"))
        torch.nn.init.normal_(weight, mean=1.0 if norm and name.endswith("weight") else 0.0, std=1.0 if place else 0.3)
    if isinstance(model, PrefixCaptioner):
        tell_apart(model)
    return model


@torch.inference_mode()
def tell_apart(model: PrefixCaptioner) -> None:
    """Leaves of image tokens what differs from picture to picture, as large as positions are."""
    tokens = torch.stack([model.image(values(picture, torch.float64))[0] for picture in pictures(24, seed=99)])
    scale = 1 / tokens.std(0).mean()
    model.project.bias.copy_((model.project.bias - tokens.mean((0, 1))) * scale)
    model.project.weight *= scale


@cache
def random_of_family(family: str, seed: int = 0, ends: float = 0.2) -> Any:
    """With large random weights in float64; `ends` is the share of steps at which greedy decoding ends."""
    torch.manual_seed(seed)
    model = random_weights(FAMILIES[family]())
    make_end(model, ends)
    if family == "florence2":  # whose checkpoints force the end
        model.generation_config.forced_eos_token_id = END
    return model


@torch.inference_mode()
def make_end(model: Any, share: float) -> None:
    """Lifts the end token's logit so that it is said at this share of the steps.

    A head without bias gets one: a channel of the last norm becomes constant and carries it. T5's last norm has none that
    could: the end token's row becomes what states have in common, as long as it takes; twice, for a question has an end too.
    """
    head = (model.text_decoder if hasattr(model, "text_decoder") else model).get_output_embeddings()
    if model.config.model_type == "vision-t5":
        for _ in range(2):
            states: list[torch.Tensor] = []
            hook = head.register_forward_pre_hook(lambda _, given: states.append(given[0]))  # noqa: B023
            logits = without_end(model)
            hook.remove()
            head.weight[END] = torch.cat(states, 1).mean((0, 1))
            ratio = logits.amax(-1) / torch.cat([head(state)[:, -1:, END] for state in states], 1).T
            head.weight[END] *= ratio[ratio > 0].quantile(0.75)  # beams find what does not end
        return
    if head.bias is None:
        norm = model.decoder.transformer.ln_f if hasattr(model, "decoder") else florence2_norm(model)
        norm.weight[0], norm.bias[0], head.weight[:, 0] = 0.0, 1.0, 0.0
    logits = without_end(model)
    lead = logits.index_fill(-1, torch.tensor([END]), -torch.inf).amax(-1) - logits[..., END]
    if head.bias is None:
        head.weight[END, 0] += lead.quantile(share)
    else:
        head.bias[END] += lead.quantile(share)


def without_end(model: Any) -> torch.Tensor:
    """The logits of 12 greedy tokens for each of 24 images, none of them the end; [12, 24, V]."""
    pixels = torch.cat([values(picture, torch.float64) for picture in pictures(24, seed=99)])
    out = model.generate(
        pixel_values=pixels,
        max_new_tokens=12,
        suppress_tokens=[END],
        output_logits=True,
        return_dict_in_generate=True,
        **{name: ids.expand(len(pixels), -1) for name, ids in prompted(model).items()},
    )
    return torch.stack(out.logits)


def florence2_norm(model: Any) -> Any:
    return model.model.language_model.decoder.layers[-1].final_layer_norm


def encoder_ids(model: Any, prompt: tuple[int, ...] = ()) -> tuple[int, ...]:
    """What an encoder that reads a question is asked."""
    start = (START,) if model.config.model_type == "florence2" else ()
    return (*start, *(prompt or (5, 6)), END)


def asks(model: Any) -> bool:
    """Whether its encoder reads a question."""
    return hasattr(family_of(model.config.to_dict()), "encoder_prompt")


def prompted(model: Any, prompt: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """A prompt as each family's `generate()` takes it; [1, W]."""
    kind = model.config.model_type
    if kind == "florence2":
        return {"input_ids": torch.tensor([[IMAGE] * IMAGE_TOKENS + list(encoder_ids(model, prompt))])}
    if kind == "prefix-captioner":
        return {"input_ids": torch.tensor([[START, *prompt]])}
    if asks(model):
        return {"input_ids": torch.tensor([encoder_ids(model, prompt)])}
    if not prompt:
        return {}
    if kind == "blip":  # which puts its start token over the first and leaves the last away
        return {"input_ids": torch.tensor([[0, *prompt, 0]])}
    if kind == "git":
        return {"input_ids": torch.tensor([[START, *prompt]])}
    return {"decoder_input_ids": torch.tensor([prompt])}


PROCESSORS: dict[str, dict[str, Any]] = {
    "blip": {"image_processor_type": "BlipImageProcessor"},
    "git": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
    },
    "florence2": {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
    "prefix": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": SIZE},
        "crop_pct": 0.875,
        "resample": 3,
    },
    "vision-t5": {},
    "vision-t5 v1.1": {},
}
PROCESSORS["tagged"] = PROCESSORS["prefix"]


def save_family(folder: Path, family: str) -> Path:
    """A whole random captioner of a family, in float32."""
    copy.deepcopy(random_of_family(family)).float().save_pretrained(folder)
    save_words(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | PROCESSORS[family]))
    return folder
