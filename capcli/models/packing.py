"""Faster modules on a CPU: linear layers with weights in oneDNN's layout and a fused GELU, and malloc settings for the process.

Only the linear layers of the given module are replaced. Nothing changes where oneDNN or glibc is missing.
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
)  # names of a linear layer and of the activation that follows it


class PackedLinear(nn.Module):
    """A linear layer whose weight is reordered once into oneDNN's layout; with `gelu`, a fused GELU (tanh) follows.

    The operators are those of PyTorch's compiler (`torch._inductor`, mkldnn fusion).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())  # noqa: SLF001
        self.bias = bias
        self.weight = None  # T5 reads its dtype
        self.follow = ("gelu", "tanh") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        name, how = self.follow
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], how)  # noqa: SLF001
        return out


def speed_up(module: nn.Module) -> None:
    """Replaces every linear layer of a module by a packed one, in place; the weights are float32 or bfloat16, on the CPU."""
    for parent, name, layer, weight in list(linear_layers(module)):
        if not can_pack(weight.dtype):
            continue
        # NewGELU's six operations cost more than the layer; the exact GELU is faster unfused (BENCHMARKS.md)
        gelu = take_gelu(parent, name, NewGELUActivation) is not None
        setattr(parent, name, PackedLinear(weight, detached(layer.bias), gelu=gelu))


def linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Any, Tensor]]:
    """Every linear layer of a module: its parent, its name there, the layer, and its weight as [outputs, inputs].

    PyTorch's MultiheadAttention keeps its own, whose weight it reads itself.
    """
    for parent in module.modules():
        if isinstance(parent, nn.MultiheadAttention):
            continue
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
    """Removes the GELU after this layer from `parent`, if it is one of `kinds`; returns its approximation, by PyTorch's name."""
    for name, follow in FUSED:
        if linear == name and isinstance(found := getattr(parent, follow, None), kinds):
            setattr(parent, follow, nn.Identity())
            return "tanh" if isinstance(found, NewGELUActivation) else "none"
    return None


def keep_memory_mapped() -> None:
    """Sets glibc's malloc to reuse large blocks instead of unmapping them: faulting in new pages costs more than using them.

    All threads share one arena, because arenas of other threads would still be trimmed. The settings apply to the whole
    process and cannot be undone, so only the command calls this, never `import capcli`. Without glibc it does nothing.
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
