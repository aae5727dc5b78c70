"""int8 linear layers on a CPU: the weights have one scale per output, the activations one per row, computed at run time.

A row's scale depends on that row alone, so a caption does not depend on the images beside it. It may depend on their number:
the float32 operations between the layers can differ in the last bits, which rounding to 8 bits can enlarge. Attention runs in
bfloat16 where a model lets it be chosen (capcli.captioning.model).
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

ROWS_PER_PART = 256  # rows multiplied at a time, so that the operations around the product stay in the cache
LEAST = 1e-30  # replaces a scale of 0, of rows that are all zeros
FINE = 254  # scale of the remainder in a `fine` layer: the largest remainder, half a quantization step, becomes 127


class Int8Linear(nn.Module):
    """A linear layer of int8 weights, float32 [..., inputs] -> float32 [..., outputs].

    `gelu` is PyTorch's name of the approximation of the GELU that follows; None: no GELU. `fine`: the activations have 16 bits,
    by a second product with the first's rounding errors. The operators are those of PyTorch's compiler (`torch._inductor`, onednn
    quantization); their activations are uint8 with zero point 128.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: str | None, fine: bool) -> None:
        super().__init__()
        weight = weight.float()
        self.scale = weight.abs().amax(1).clamp_min(LEAST) / 127
        whole = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(
            whole.contiguous(), None
        )  # with another layout the result is wrong, without an error
        self.zeros = torch.zeros(len(weight), dtype=torch.int8)
        self.bias, self.gelu, self.fine = bias, gelu, fine
        self.weight = None  # T5 reads its dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(len(rows), len(self.scale))
        for part, result in zip(torch.split(rows, ROWS_PER_PART), torch.split(out, ROWS_PER_PART), strict=True):
            self.multiply(part, result)
        return out.view(*x.shape[:-1], -1)

    def multiply(self, rows: Tensor, out: Tensor) -> None:
        """Writes the layer's result for `rows` float32 [n, inputs] into `out` [n, outputs]."""
        step = rows.abs().amax(-1, keepdim=True).clamp_min(LEAST) / 127
        steps = rows * (1 / step)
        whole = steps.round() if self.fine else steps.round_()
        product = self.product(whole)
        if self.fine:
            product.add_(self.product((steps - whole).mul_(FINE).round_()), alpha=1 / FINE)
        sums = out if self.gelu is None else product
        if self.bias is None:
            torch.mul(product, step, out=sums)  # a NaN stays a NaN: the image becomes a failure
        else:
            torch.addcmul(self.bias, product, step, out=sums)
        if self.gelu is not None:
            GELU[self.gelu](sums, out)

    def product(self, whole: Tensor) -> Tensor:
        """The product of whole numbers from -127 to 127 [n, inputs] with the weights -> float32 [n, outputs]."""
        left = whole.to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            left, 1.0, 128, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


def gelu_by_erf(x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu.out(x, out=out)


def gelu_by_tanh(x: Tensor, out: Tensor) -> None:
    """The tanh approximation with a sigmoid, as (1 + tanh(y)) / 2 = sigmoid(2 y); it takes half the time."""
    scale = 2 * math.sqrt(2 / math.pi)
    torch.mul(x, x, out=out)
    out.mul_(0.044715 * scale).add_(scale).mul_(x).sigmoid_().mul_(x)


GELU = {"none": gelu_by_erf, "tanh": gelu_by_tanh}  # keys: PyTorch's names of the approximations


def quantize_both(encode: Encode, step: Step) -> None:
    """`quantize` for a captioner's two modules, each of which may contain layers that the other runs."""
    quantize(encode.encoder)
    quantize(step, step.vocabulary)
    quantize(encode)


def quantize(module: nn.Module, vocabulary: int | None = None) -> None:
    """Replaces every linear layer of a float32 module by an int8 one, in place. `vocabulary` is that of a step; None: no step.

    In a step, the output layer and layers with fewer outputs than inputs are `fine`. Otherwise twice as many captions would
    differ from float32; more fine layers would hardly help (BENCHMARKS.md).
    """
    from transformers.activations import GELUActivation, NewGELUActivation

    from capcli.models.packing import (  # imports transformers, which `int8_lacks` does not need
        detached,
        linear_layers,
        take_gelu,
    )

    for parent, name, layer, weight in list(linear_layers(module)):
        outputs, inputs = weight.shape
        fine = vocabulary is not None and (outputs == vocabulary or outputs < inputs)
        gelu = take_gelu(parent, name, GELUActivation, NewGELUActivation)
        setattr(parent, name, Int8Linear(weight, detached(layer.bias), gelu=gelu, fine=fine))


@cache
def int8_lacks() -> str | None:
    """What this CPU or PyTorch lacks for int8; None where nothing is missing.

    Without VNNI the products saturate at 16 bits without an error, so the largest product is computed and compared.
    """
    if not hasattr(torch.ops.onednn, "qlinear_prepack"):
        return "this PyTorch has no oneDNN"
    capabilities = cpu_capabilities()
    if not any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8")):
        return "this CPU has no VNNI"
    most = Int8Linear(torch.ones(16, 64), None, gelu=None, fine=False).product(torch.full((1, 64), 127.0))
    if not torch.allclose(most, torch.tensor(64 * 127.0)):
        return "oneDNN does not use this CPU's VNNI (ONEDNN_MAX_CPU_ISA may be set)"
    return None


def int8_refused(device: torch.device) -> str | None:
    """Why a device cannot run int8 layers; None where it can."""
    return int8_lacks() if device.type == "cpu" else "it is for CPUs"
