"""Attention on a CPU where plain products beat PyTorch's flash kernel; everything else is PyTorch's own."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from capcli.models.dtypes import cpu_capabilities, multiplies_bfloat16

# What pays was measured on both kinds of CPU (BENCHMARKS.md).
FEW = 16  # query rows up to which products are quicker: the kernel's tiles are made for many
TOGETHER = 2  # images whose scores are made at a time: they stay in the cache
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
    """query [S, H, Q, D] on keys and values [S, H, N, D] -> [S, Q, H, D].

    The mask is added to the scores; one of booleans says what is seen.
    """
    if key.dtype != query.dtype:  # what is kept of an image may be coarser than what asks for it
        mask = attention_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(key.dtype)
        coarse, _ = attend(module, query.to(key.dtype), key, value, mask, scaling, **kwargs)
        return coarse.to(query.dtype), None
    bias = kwargs.pop("position_bias", None)
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    added = attention_mask is None or attention_mask.dtype != torch.bool
    if query.device.type == "cpu" and added:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if few(query):
            return products(query * scale, key, value, attention_mask).transpose(1, 2), None
        if many(query) and attention_mask is None:
            return by_parts(query * scale, key, value), None
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=False, **kwargs
    )[0]
    return out, None


def attend_coarsely(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend` in bfloat16, as captioners of int8 layers do."""
    key, value = (x.to(torch.bfloat16) for x in (key, value))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def few(query: Tensor) -> bool:
    """Whether these are so few rows of queries that products are quicker; with AMX one row alone is not."""
    return (2 if has_amx() else 1) <= query.shape[2] <= FEW


def many(query: Tensor) -> bool:
    """Whether the kernel multiplies these without the CPU's bfloat16 units, which products use."""
    return query.dtype == torch.bfloat16 and multiplies_bfloat16() and not has_amx()


@cache
def has_amx() -> bool:
    """Whether this CPU has tiles of bfloat16, which PyTorch's flash kernel uses."""
    return bool(cpu_capabilities().get("amx_bf16"))


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def by_parts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`products` of a few images at a time -> [S, Q, H, D]; of as many each time, for a caption's sake (loop.Shapes)."""
    images, heads, rows, size = query.shape
    together = math.gcd(images, TOGETHER)
    out = query.new_empty(images, rows, heads, size)
    for begin in range(0, images, together):
        part = slice(begin, begin + together)
        # contiguous: heads that lie between each other are multiplied at half the speed
        q, k, v = (x[part].contiguous() for x in (query, key, value))
        out[part] = products(q, k, v, None).transpose(1, 2)
    return out


def use_attention(part: Any, *, coarse: bool = False) -> bool:
    """Makes one of transformers' models attend so, where it lets its attention be chosen; whether it does."""
    if not getattr(part, "_supports_attention_backend", False):
        return False
    name = f"{NAME}-coarse" if coarse else NAME
    AttentionInterface.register(name, attend_coarsely if coarse else attend)
    part.set_attn_implementation(name)
    return True
