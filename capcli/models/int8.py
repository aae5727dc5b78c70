"""Linear layers in 8 bits on a CPU: a scale for each output of the weights, and for each row of what they multiply.

A row's scale hangs on that row alone, so no caption depends on its neighbours; on their number it may, for the last bits of
what stays float32, which 8 bits can round apart. Where a model lets its attention be chosen, that is bfloat16
(capcli.captioning.model).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capcli.models.dtypes import cpu_capabilities

if TYPE_CHECKING:
    from capcli.models.modules import Encode, Step

TOGETHER = 256  # rows at a time: what comes before and after their product stays in the cache
LEAST = 1e-30  # in place of 0, for rows that are all zeros
FINE = 254  # parts of a step of 8 bits in which its rounding is told: half a step is 127


class Int8Linear(nn.Module):
    """A linear layer of int8 weights; with `gelu`, PyTorch's name of an approximation, that follows.

    `fine`: what is multiplied has 16 bits, by a second product with what the first rounded off. The operators are PyTorch's
    own, which its compiler uses (`torch._inductor`, onednn quantization). Their left side is unsigned: 128 is 0.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: str | None, fine: bool) -> None:
        super().__init__()
        weight = weight.float()
        self.scale = weight.abs().amax(1).clamp_min(LEAST) / 127
        whole = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(whole.contiguous(), None)  # other layouts: garbage, in silence
        self.zeros = torch.zeros(len(weight), dtype=torch.int8)
        self.bias, self.gelu, self.fine = bias, gelu, fine
        self.weight = None  # T5 asks for its dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), len(self.scale))
        for each, made in zip(torch.split(rows, TOGETHER), torch.split(out, TOGETHER), strict=True):
            self.multiply(each, made)
        return out.view(*x.shape[:-1], -1)

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """float32 [n, inputs] -> out [n, outputs]."""
        step = rows.abs().amax(-1, keepdim=True).clamp_min(LEAST) / 127
        steps = rows * (1 / step)
        whole = steps.round() if self.fine else steps.round_()
        product = self.product(whole)
        if self.fine:
            product.add_(self.product((steps - whole).mul_(FINE).round_()), alpha=1 / FINE)
        sums = out if self.gelu is None else product
        if self.bias is None:
            torch.mul(product, step, out=sums)  # no number where there was none: the image is a failure
        else:
            torch.addcmul(self.bias, product, step, out=sums)
        if self.gelu is not None:
            GELU[self.gelu](sums, out)

    def product(self, whole: Tensor) -> Tensor:
        """Of whole numbers from -127 to 127, [n, inputs], with the weights."""
        left = whole.to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            left, 1.0, 128, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


def gelu_by_erf(x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu.out(x, out=out)


def gelu_by_tanh(x: Tensor, out: Tensor) -> None:
    """By a sigmoid, which is the same: (1 + tanh(y)) / 2 is sigmoid(2 y), and takes half the time."""
    scale = 2 * math.sqrt(2 / math.pi)
    torch.mul(x, x, out=out)
    out.mul_(0.044715 * scale).add_(scale).mul_(x).sigmoid_().mul_(x)


GELU = {"none": gelu_by_erf, "tanh": gelu_by_tanh}  # by PyTorch's name of the approximation


def quantize_both(encode: Encode, step: Step) -> None:
    """`quantize` for a captioner's two modules, each of which may hold layers that the other runs."""
    quantize(encode.encoder)
    quantize(step, step.vocabulary)
    quantize(encode)


def quantize(module: nn.Module, vocabulary: int | None = None) -> None:
    """Makes every linear layer of a float32 module one of int8, in place; some are fine in a step, which says words.

    Those are what chooses from the `vocabulary`, and layers that narrow: were they coarse, twice as many captions would be
    worded otherwise than in float32, and were others fine too, hardly fewer (BENCHMARKS.md).
    """
    from transformers.activations import GELUActivation, NewGELUActivation

    from capcli.models.packing import detached, linear_layers, take_gelu  # with transformers, which `lacking` needs not

    for parent, name, layer, weight in list(linear_layers(module)):
        outputs, inputs = weight.shape
        fine = vocabulary is not None and (outputs == vocabulary or outputs < inputs)
        gelu = take_gelu(parent, name, GELUActivation, NewGELUActivation)
        made = Int8Linear(weight, detached(layer.bias), gelu=gelu, fine=fine)
        setattr(parent, name, made)


@cache
def lacking() -> str | None:
    """What a CPU, or PyTorch, lacks for this; None where nothing is missing.

    Without VNNI the products saturate at 16 bits: other numbers, in silence. So the largest there are is tried.
    """
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this PyTorch has no oneDNN"
    able = cpu_capabilities()
    if not any(able.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this CPU has no VNNI"
    most = Int8Linear(torch.ones(16, 64), None, gelu=None, fine=False).product(torch.full((1, 64), 127.0))
    if not torch.allclose(most, torch.tensor(64 * 127.0)):
        return "oneDNN does not use this CPU's VNNI (ONEDNN_MAX_CPU_ISA may be set)"
    return None


def int8_refused(device: torch.device) -> str | None:
    """Why a device cannot multiply in int8; None where it can."""
    return lacking() if device.type == "cpu" else "it is for CPUs"
