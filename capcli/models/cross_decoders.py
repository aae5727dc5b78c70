"""The decoders of VisionEncoderDecoderModel: GPT-2, BERT, RoBERTa, XLM-RoBERTa, BART, mBART and TrOCR.

A decoder is transformers' model with its output layer, and what is here depends on its kind: its step, the keys and values
of its cross-attention, its length, and its padding token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache

from capcli.models.modules import CrossStep, Step, split_heads

ROBERTA = ("roberta", "xlm-roberta")
BART = ("bart", "mbart", "trocr")


class BertStep(CrossStep):
    """One pass of BERT or GPT-2."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)
        config = self.decoder.config
        self.positions, self.vocabulary = length(config), config.vocab_size


class RobertaStep(BertStep):
    """One pass of RoBERTa, whose positions start after the id of its padding token; padding keeps that id as its position."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__(decoder)
        self.padding: int = self.decoder.base_model.embeddings.padding_idx

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        return super().logits(tokens, after_padding(tokens, position, self.padding), mask, cache)


class BartStep(Step):
    """One pass of BART, mBART or TrOCR, and of their output layer `head`.

    The forward of these decoders ignores position ids and counts positions itself, so their layers are called one by one.
    """

    def __init__(self, decoder: nn.Module, head: nn.Module, config: Any) -> None:
        super().__init__(decoder)
        keep_sinusoids(decoder)
        self.head = head
        self.positions, self.vocabulary = config.max_position_embeddings, config.vocab_size

    def logits(self, tokens: Tensor, position: Tensor, mask: Tensor, cache: EncoderDecoderCache) -> Tensor:
        decoder: Any = self.decoder
        cross: Any = cache.cross_attention_cache.layers[0]
        x = decoder.embed_tokens(tokens) + embed_positions(decoder.embed_positions, tokens, position)
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        for layer in decoder.layers:
            out = layer(
                x, mask, cross.keys[:, 0], past_key_values=cache
            )  # only its presence is used: the cross layers are filled
            x = out[0] if isinstance(out, tuple) else out  # TrOCR's layers return a tuple
        final = getattr(decoder, "layer_norm", None)  # mBART has one
        logits: Tensor = self.head(x if final is None else final(x))
        return logits


def step_of(decoder: Any) -> Step:
    """The step of a decoder."""
    kind = decoder.config.model_type
    if kind in BART:
        return BartStep(decoder.base_model.decoder, decoder.get_output_embeddings(), decoder.config)
    return RobertaStep(decoder) if kind in ROBERTA else BertStep(decoder)


def keys_values(decoder: Any, features: Tensor) -> tuple[Tensor, ...]:
    """Keys and values of every layer's cross-attention in turn, [E, H, M, D] each, of `features` [E, M, C]."""
    return tuple(t for layer in cross_layers(decoder) for t in layer_memory(layer, features))


def cross_layers(decoder: Any) -> list[nn.Module]:
    """The cross-attention modules of the decoder's layers, in order."""
    kind, inner = decoder.config.model_type, decoder.base_model
    if kind in BART:
        return [layer.encoder_attn for layer in inner.decoder.layers]
    if kind == "gpt2":
        return [block.crossattention for block in inner.h]
    return [layer.crossattention.self for layer in inner.encoder.layer]


def layer_memory(layer: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """One layer's keys and values, [E, H, M, D] each, of `features` [E, M, C]."""
    if hasattr(layer, "c_attn"):  # GPT-2
        keys, values = layer.c_attn(features).split(layer.split_size, 2)
        heads = layer.num_heads
    elif hasattr(layer, "k_proj"):  # BART
        keys, values = layer.k_proj(features), layer.v_proj(features)
        heads = layer.num_heads
    else:
        keys, values = layer.key(features), layer.value(features)
        heads = layer.num_attention_heads
    return split_heads(keys, heads), split_heads(values, heads)


def length(config: Any) -> int:
    """The most tokens of a decoder's sequence, from its config; RoBERTa's table also has rows up to its padding token's id."""
    positions: int = config.max_position_embeddings
    return positions - config.pad_token_id - 1 if config.model_type in ROBERTA else positions


def set_padding(decoder: Any, token: int) -> None:
    """Makes `token` the padding of a decoder that counts positions from its padding token's id.

    With another id in its config alone, positions would shift when the decoder is saved and loaded.
    """
    if decoder.config.model_type in ROBERTA:
        decoder.base_model.embeddings.padding_idx = token
    elif decoder.config.model_type in BART and hasattr(decoder.base_model.decoder.embed_positions, "weights"):
        decoder.base_model.decoder.embed_positions.padding_idx = token
    decoder.config.pad_token_id = token


def after_padding(tokens: Tensor, position: Tensor, padding: int) -> Tensor:
    """Rows of a position table that starts after the padding token's id; padding itself is at its id."""
    return torch.where(tokens == padding, padding, position + padding + 1)


def embed_positions(table: Any, tokens: Tensor, position: Tensor) -> Tensor:
    """Position embeddings [S, Q, C] from BART's table, or TrOCR's sinusoids."""
    if hasattr(table, "weights"):
        return nn.functional.embedding(after_padding(tokens, position, table.padding_idx), table.weights)
    return nn.functional.embedding(position + table.offset, table.weight)


def keep_sinusoids(decoder: Any) -> None:
    """Makes TrOCR's sinusoids a buffer, which moves with the model and is not saved.

    In transformers they are a plain tensor, which stays without values when a checkpoint is loaded (5.23) and on the CPU
    when the model moves to a GPU.
    """
    table = decoder.embed_positions
    if not isinstance(getattr(table, "weights", None), Tensor) or "weights" in dict(table.named_buffers()):
        return
    rows, kept = decoder.config.max_position_embeddings + table.padding_idx + 1, decoder.embed_tokens.weight
    sinusoids = table.get_embedding(rows, table.embedding_dim, table.padding_idx)
    del table.weights
    table.register_buffer("weights", sinusoids.to(kept), persistent=False)
