"""The attention function for models on CPUs: matrix products where they beat PyTorch's kernel, PyTorch's elsewhere.

It is registered with transformers under separate names, so models that capcli did not load keep their attention.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from capcli.models.dtypes import cpu_capabilities, multiplies_bfloat16

# Measured on CPUs with and without AMX (BENCHMARKS.md).
FEW = 16  # query rows up to which matrix products are faster than the flash kernel, whose tiles are for many rows
IMAGES_PER_PART = 2  # images whose scores are computed at a time, so that they stay in the cache
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
    """query [S, H, Q, D], key and value [S, H, N, D] -> [S, Q, H, D].

    A floating mask is added to the scores; a bool mask is true where a key is visible.
    """
    if key.dtype != query.dtype:  # the slots' buffers may be bfloat16 where the decoder computes in float32
        mask = attention_mask
        if mask is not None and mask.is_floating_point():
            mask = mask.to(key.dtype)
        rounded, _ = attend(module, query.to(key.dtype), key, value, mask, scaling, **kwargs)
        return rounded.to(query.dtype), None
    bias = kwargs.pop("position_bias", None)
    if bias is not None:
        attention_mask = bias if attention_mask is None else attention_mask + bias
    additive = attention_mask is None or attention_mask.dtype != torch.bool
    if query.device.type == "cpu" and additive:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if products_are_faster(query):
            return products(query * scale, key, value, attention_mask).transpose(1, 2), None
        if kernel_lacks_bfloat16(query) and attention_mask is None:
            return by_parts(query * scale, key, value), None
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=False, **kwargs
    )[0]
    return out, None


def attend_in_bfloat16(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend` in bfloat16, for models with int8 layers."""
    key, value = (x.to(torch.bfloat16) for x in (key, value))
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


def products_are_faster(query: Tensor) -> bool:
    """Whether there are so few query rows that `products` is faster; with AMX, a single row is not."""
    return (2 if has_amx() else 1) <= query.shape[2] <= FEW


def kernel_lacks_bfloat16(query: Tensor) -> bool:
    """Whether PyTorch's kernel would not use the CPU's bfloat16 instructions, which `products` does use."""
    return query.dtype == torch.bfloat16 and multiplies_bfloat16() and not has_amx()


@cache
def has_amx() -> bool:
    """Whether this CPU has AMX for bfloat16, which PyTorch's flash kernel uses."""
    return bool(cpu_capabilities().get("amx_bf16"))


def products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as matrix products; `query` is already scaled -> [S, H, Q, D]."""
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def by_parts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`products` for a few images at a time -> [S, Q, H, D]. All parts have one size, so results do not depend on the part."""
    images, heads, rows, size = query.shape
    part_size = math.gcd(images, IMAGES_PER_PART)
    out = query.new_empty(images, rows, heads, size)
    for begin in range(0, images, part_size):
        part = slice(begin, begin + part_size)
        # contiguous: products of interleaved heads take twice as long
        q, k, v = (x[part].contiguous() for x in (query, key, value))
        out[part] = products(q, k, v, None).transpose(1, 2)
    return out


def use_attention(part: Any, *, bfloat16: bool = False) -> bool:
    """Sets the attention function of one of transformers' models; returns False where the model does not support that.

    The registration with transformers applies to the whole process, but only models set to this name use the function.
    """
    if not getattr(part, "_supports_attention_backend", False):
        return False
    name = f"{NAME}-bfloat16" if bfloat16 else NAME
    AttentionInterface.register(name, attend_in_bfloat16 if bfloat16 else attend)
    part.set_attn_implementation(name)
    return True
