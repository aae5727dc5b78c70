"""A captioner's modules made fast on a CPU: weights packed once in oneDNN's own layout, activations fused, memory kept mapped.

transformers' modules stay as they are, with their linear layers swapped; where oneDNN or glibc is missing nothing changes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

FUSED = (
    ("c_fc", "act"),
    ("fc1", "activation_fn"),
    ("dense", "intermediate_act_fn"),
)  # a linear layer and what follows it


class PackedLinear(nn.Module):
    """A linear layer whose weight is reordered once for the matrix units; with `gelu`, that follows, fused.

    The operators are PyTorch's own, which its compiler uses (`torch._inductor`, mkldnn fusion).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001
        self.bias = bias
        self.weight = None  # T5 asks for its dtype
        self.follow = ("gelu", "tanh") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        name, how = self.follow
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], how)  # noqa: SLF001
        return out


def speed_up(module: nn.Module) -> None:
    """Packs every linear layer of a module in place; its weights are float32 or bfloat16 and on the CPU."""
    for parent, name, layer, weight in list(linear_layers(module)):
        if not can_pack(weight.dtype):
            continue
        # written out in six operations it costs more than the layer; the exact one is quicker by itself (BENCHMARKS.md)
        gelu = take_gelu(parent, name, NewGELUActivation) is not None
        setattr(parent, name, PackedLinear(weight, detached(layer.bias), gelu=gelu))


def linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Tensor]]:
    """Every linear layer in a module: what holds it and under which name, itself, its weight as [outputs, inputs]."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear | Conv1D):
                weight = child.weight if isinstance(child, nn.Linear) else child.weight.t()
                yield parent, name, child, weight.detach()


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype here: float32 everywhere, bfloat16 on CPUs with AVX-512 or AVX-NE-CONVERT."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001
    return dtype == torch.float32


def detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def take_gelu(parent: Any, linear: str, *kinds: type[nn.Module]) -> str | None:
    """Takes the GELU that follows this layer out of `parent`, if of these kinds; its approximation, by PyTorch's name."""
    for name, follow in FUSED:
        if linear == name and isinstance(found := getattr(parent, follow, None), kinds):
            setattr(parent, follow, nn.Identity())
            return "tanh" if isinstance(found, NewGELUActivation) else "none"
    return None


def keep_memory_mapped() -> None:
    """Tells glibc to reuse large blocks instead of returning them: fresh pages cost more than the work done in them.

    All threads take them from one arena: those of their own would be returned all the same.
    For the whole process, so it is for the command and not for those who import capcli. Elsewhere it does nothing.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 256 << 20)
    mallopt(arena_max, 1)
