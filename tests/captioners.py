"""Random captioners of every supported shape, small enough to make in a test, whose captions end at different steps."""

from __future__ import annotations

import torch
from transformers import (
    BeitConfig,
    BertConfig,
    DeiTConfig,
    GPT2Config,
    PretrainedConfig,
    Swinv2Config,
    SwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

SIZE = 32


def encoder_config(kind: str) -> PretrainedConfig:
    small = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": SIZE}
    if kind in ("vit", "deit", "beit"):
        made: PretrainedConfig = {"vit": ViTConfig, "deit": DeiTConfig, "beit": BeitConfig}[kind](**small, patch_size=8)
        return made
    swin = SwinConfig if kind == "swin" else Swinv2Config
    return swin(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)


def decoder_config(kind: str, width: int, vocabulary: int, **more: object) -> PretrainedConfig:
    if kind == "gpt2":
        sizes = {"n_embd": width, "n_layer": 3, "n_head": 4, "n_positions": 64}
        return GPT2Config(vocab_size=vocabulary, **sizes, add_cross_attention=True, is_decoder=True, **more)
    sizes = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * width}
    return BertConfig(
        vocab_size=vocabulary, **sizes, max_position_embeddings=64, add_cross_attention=True, is_decoder=True, **more
    )


def random_captioner(
    encoder: str = "vit",
    decoder: str = "gpt2",
    *,
    width: int = 48,
    vocabulary: int = 120,
    seed: int = 0,
    end_bias: float = 1.5,
    one_id: bool = False,
    **more: object,
) -> VisionEncoderDecoderModel:
    """A captioner with large random weights whose captions end early and late.

    `end_bias` makes the end token likelier, in standard deviations of the logits. `one_id`: start, end and padding are one
    token, as in the most used checkpoint.
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
        place = "wpe" in name or "position_embeddings" in name
        torch.nn.init.normal_(weight, mean=1.0 if norm and name.endswith("weight") else 0.0, std=1.0 if place else 0.3)
    end = vocabulary - 1
    bias_end(model, end, end_bias)
    start = end if one_id else vocabulary - 2
    pad = end if one_id else vocabulary - 3
    for place in (model.generation_config, model.config):
        place.decoder_start_token_id, place.eos_token_id, place.pad_token_id, place.bos_token_id = start, end, pad, start
    return model


@torch.inference_mode()
def bias_end(model: VisionEncoderDecoderModel, end: int, bias: float) -> None:
    """Adds to the end token's logit. GPT-2's head has no bias: its row moves along the last norm's bias instead."""
    head = model.decoder.get_output_embeddings()
    picture = torch.rand(1, 3, SIZE, SIZE) * 2 - 1
    logits = model(pixel_values=picture, decoder_input_ids=torch.arange(8)[None]).logits
    amount = bias * logits.std()
    if head.bias is not None:
        head.bias[end] += amount
    else:
        along = model.decoder.transformer.ln_f.bias
        head.weight[end] += along * amount / along.square().sum()
