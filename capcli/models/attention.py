"""Attention for a few query rows on long keys, as the decoder's steps have it; everything else is PyTorch's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FEW = (
    16  # query rows up to which two plain products beat the flash kernel, whose tiles they cannot fill (BENCHMARKS.md)
)
NAME = "capcli"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [S, H, Q, D] on keys and values [S, H, N, D] -> [S, Q, H, D]; the mask is added to the scores."""
    few = query.device.type == "cpu" and 1 < query.shape[2] <= FEW
    bias = kwargs.pop("position_bias", None)
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    if not few:
        out: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=False, **kwargs
        )[0]
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def use_attention(decoder: Any) -> None:
    """Makes a transformers decoder attend so, where it lets its attention be chosen."""
    if not getattr(decoder, "_supports_attention_backend", False):
        return
    AttentionInterface.register(NAME, attend)
    decoder.set_attn_implementation(NAME)
