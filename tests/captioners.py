"""Small random captioners of every supported shape, whose captions end early, late and not at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from capcli.decoding.loop import IterableFeed, Job
from capcli.decoding.parallel import decode_in_parallel
from capcli.decoding.search import Hypothesis
from capcli.decoding.settings import Settings
from capcli.decoding.shapes import Shapes
from capcli.models.attention import use_attention
from capcli.models.families import family_of
from capcli.models.modules import Encode, Step
from capcli.models.packing import speed_up
from capcli.runtimes.eager import Eager

SIZE = 32
HALF = (0.5, 0.5, 0.5)
# Width of the encoders' features.
WIDTH = {
    **dict.fromkeys(("vit", "deit", "beit"), 40),
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), 32),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "dinov2", "dinov2_with_registers"), 40),
}
DECODERS: dict[str, tuple[str, dict[str, object]]] = {  # kind and further values of the config
    "gpt2": ("gpt2", {}),
    "bert": ("bert", {}),
    "roberta": ("roberta", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "bart": ("bart", {}),
    "mbart": ("mbart", {"scale_embedding": True}),
    "trocr": ("trocr", {}),
    "trocr, sinusoids": ("trocr", {"use_learned_position_embeddings": False, "layernorm_embedding": False}),
}

transformers.logging.set_verbosity_error()


def encoder_config(kind: str) -> PretrainedConfig:
    small = {
        "hidden_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": SIZE,
    }
    if "swin" not in kind:
        return AutoConfig.for_model(kind, **small, patch_size=8)
    windows = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    return AutoConfig.for_model(kind, image_size=[SIZE, SIZE] if kind == "donut-swin" else SIZE, **windows)


def decoder_config(kind: str, width: int, vocabulary: int, **more: object) -> PretrainedConfig:
    more = {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "add_cross_attention": True,
        "is_decoder": True,
    } | more
    kind, values = DECODERS[kind]
    more = {"vocab_size": vocabulary, "max_position_embeddings": 64} | values | more
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": 3, "n_head": 4}
    elif "bert" in kind:
        sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    else:
        sizes = {"d_model": width, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 2 * width}
    return AutoConfig.for_model(kind, **(sizes | more))


@cache
def random_captioner(
    encoder: str = "vit",
    decoder: str = "gpt2",
    *,
    width: int = 48,
    vocabulary: int = 120,
    seed: int = 0,
    ends: float = 0.2,
    one_id: bool = False,
    dtype: torch.dtype = torch.float32,
    **more: object,
) -> VisionEncoderDecoderModel:
    """A captioner with large random weights, the same object for the same arguments: do not change it.

    `ends` is the share of steps at which greedy decoding ends. `one_id`: start, end and padding are one token, as in the most
    downloaded checkpoint.
    """
    torch.manual_seed(seed)
    more = {"tie_word_embeddings": False} | more
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder_config(encoder), decoder_config(decoder, width, vocabulary, **more)
    )
    config.tie_word_embeddings = False
    model = VisionEncoderDecoderModel(config).eval()
    for name, weight in model.named_parameters():
        norm = "norm" in name.lower() or ".ln_" in name
        place = any(sign in name for sign in ("wpe", "position_embeddings", "embed_positions"))
        torch.nn.init.normal_(weight, mean=1.0 if norm and name.endswith("weight") else 0.0, std=1.0 if place else 0.3)
    end = vocabulary - 1
    start = end if one_id else vocabulary - 2
    pad = end if one_id else vocabulary - 3
    for place in (model.generation_config, model.config):
        place.bos_token_id = place.decoder_start_token_id = start
        place.eos_token_id, place.pad_token_id = end, pad
    make_end(model, end, ends)
    return model.to(dtype)


@torch.inference_mode()
def make_end(model: VisionEncoderDecoderModel, end: int, share: float) -> None:
    """Raises or lowers the end token's logit so that it is the highest at this share of the steps.

    In a head without bias, one channel of the last norm becomes constant and acts as one.
    """
    head = model.decoder.get_output_embeddings()
    if head.bias is None:
        norm = last_norm(model.decoder)
        norm.weight[0], norm.bias[0], head.weight[:, 0] = 0.0, 1.0, 0.0
    pixels = torch.cat([values(picture) for picture in pictures(24, seed=99)])
    out = model.generate(
        pixels, max_new_tokens=12, suppress_tokens=[end], output_logits=True, return_dict_in_generate=True
    )
    logits = torch.stack(out.logits)  # [steps, images, V]
    lead = logits.index_fill(-1, torch.tensor([end]), -torch.inf).amax(-1) - logits[..., end]
    lift = lead.quantile(share)
    if head.bias is None:
        head.weight[end, 0] += lift
    else:
        head.bias[end] += lift


def last_norm(decoder: Any) -> Any:
    inner = decoder.base_model
    if hasattr(inner, "ln_f"):  # GPT-2
        return inner.ln_f
    return (
        getattr(inner.decoder, "layer_norm", None) or inner.decoder.layers[-1].final_layer_norm
    )  # mBART has a final one


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(count)]


def values(picture: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A picture as transformers' image processor normalises it, [1, 3, h, w]."""
    x = torch.from_numpy(picture.astype(np.float64) * (1 / 255)).float()
    return ((x - 0.5) / 0.5).permute(2, 0, 1)[None].to(dtype)


@cache
def modules(model: PreTrainedModel) -> tuple[Encode, Step]:
    """The modules of a copy of a captioner, prepared as when it is loaded."""
    own, family = copy.deepcopy(model), family_of(model.config.to_dict())
    encode, step = family.Encode(own, 1 / 255, HALF, HALF).eval(), family.Step(own).eval()
    use_attention(step.decoder)
    if model.dtype != torch.float64:
        speed_up(encode)
        speed_up(step)
    return encode, step


def eager(model: PreTrainedModel, lag: int = 0) -> Eager:
    """The runtime of a captioner; finished flags are read `lag` steps late."""
    encode, step = modules(model)
    runtime = Eager(encode, step, torch.device("cpu"), prefixed=encode.prefixed)
    runtime.lag = lag
    return runtime


def captions(
    model: PreTrainedModel,
    images: Sequence[np.ndarray],
    settings: Settings,
    shapes: Shapes = Shapes(4, 2),  # noqa: B008
    keys: Sequence[int] | None = None,
    lag: int = 0,
    encoder_ids: Sequence[tuple[int, ...]] | None = None,
) -> list[list[Hypothesis]]:
    """capcli's captions of each of `images`."""
    jobs = [
        Job(i, image, keys[i] if keys else 0, encoder_ids[i] if encoder_ids else ()) for i, image in enumerate(images)
    ]
    found = {}
    for done in chain.from_iterable(
        decode_in_parallel(IterableFeed(jobs), eager(model, lag).replicas(shapes.loops), settings, shapes)
    ):
        assert done.tag not in found, "captioned twice"
        found[done.tag] = done.hypotheses
    return [found[i] for i in range(len(images))]
