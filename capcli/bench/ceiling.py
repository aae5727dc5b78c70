"""The ceiling: the time that a captioner's arithmetic and memory traffic take at this machine's measured peak rates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from capcli.decoding.settings import Settings
from capcli.models.checkpoint import encode_and_step, quiet_transformers
from capcli.models.dtypes import DTYPES
from capcli.models.families import family_of
from capcli.models.int8 import Int8Linear
from capcli.models.model_files import ModelFiles
from capcli.models.packing import PackedLinear, can_pack
from capcli.pixels import PixelSpec

SECONDS = 0.6  # for measuring each rate
SIDE = 2048  # of the square matrices multiplied
READ = 1 << 28  # bytes read at a time: more than fits into any cache


@dataclass(frozen=True, slots=True)
class Rates:
    """The peak rates of a device: floating-point operations per second in matrix products, and bytes read per second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class CaptionCost:
    """The cost of captions: operations to encode an image, and operations and bytes of one step of all slots."""

    encode_flops: float
    step_flops: float
    step_bytes: float
    slots: int

    def images_per_second(self, rates: Rates, tokens: float) -> float:
        """The rate for captions of `tokens` tokens; a step takes the longer of its arithmetic and its memory traffic."""
        step = max(self.step_flops / rates.flops, self.step_bytes / rates.bandwidth)
        return 1 / (self.encode_flops / rates.flops + tokens * step / self.slots)


def peak_rates(device: torch.device, dtype: str) -> Rates:
    """The peak rates of `device` in `dtype`, measured."""
    torch_dtype = DTYPES[dtype]
    if dtype == "int8":
        return Rates(2 * SIDE**3 / fastest(int8_product(), device), bandwidth(device))
    left = torch.randn(SIDE, SIDE, device=device).to(torch_dtype)
    right = torch.randn(SIDE, SIDE, device=device).to(torch_dtype)
    products: list[Callable[[], Any]] = [lambda: left @ right]
    if device.type == "cpu" and can_pack(torch_dtype):
        packed = PackedLinear(right, None, gelu=False)
        products.append(lambda: packed(left))
    flops = max(2 * SIDE**3 / fastest(product, device) for product in products)
    return Rates(flops, bandwidth(device))


def int8_product() -> Callable[[], Any]:
    layer = Int8Linear(torch.randn(SIDE, SIDE), None, gelu=None, fine=False)
    integers = torch.randint(-127, 128, (SIDE, SIDE)).float()
    return lambda: layer.product(integers)


def bandwidth(device: torch.device) -> float:
    block = torch.ones(READ // 4, device=device)
    return READ / fastest(lambda: block.sum(), device)


def fastest(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest repetition within SECONDS."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def cost_of(files: ModelFiles, size: tuple[int, int], settings: Settings, slots: int, dtype: str) -> CaptionCost:
    """Counted on the captioner's modules without weights, for steps at half of the longest caption."""
    with torch.device("meta"), quiet_transformers():
        model = build_model(files.config).to(DTYPES[dtype]).eval()
        model.set_attn_implementation("eager")  # FlopCounterMode counts its products on every device
    encode, step = encode_and_step(model, PixelSpec.from_config(files.processor))
    encoder_ids = (
        (torch.zeros(1, len(settings.encoder_ids), dtype=torch.long, device="meta"),) if settings.encoder_ids else ()
    )
    with torch.inference_mode(), FlopCounterMode(display=False) as encoding:
        encoded = encode(torch.zeros(1, *size, 3, dtype=torch.uint8, device="meta"), *encoder_ids)
    entries = len(settings.prompt) - 1 + settings.rows * max(settings.max_new_tokens // 2, 1)
    memory, pool = _slot_tensors(encoded, slots, entries, prefixed=encode.prefixed)
    tokens = torch.zeros(slots, settings.rows, dtype=torch.long, device="meta")
    visible = torch.ones(slots, settings.rows, pool[0].shape[2], dtype=torch.bool, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as stepping:
        step(tokens, tokens, tokens[:, 0], visible, memory, pool)
    bytes_read = sum(_size(x) for x in (*memory, *pool)) + weight_bytes(step) // (4 if dtype == "int8" else 1)
    return CaptionCost(float(encoding.get_total_flops()), float(stepping.get_total_flops()), float(bytes_read), slots)


def build_model(config: dict[str, Any]) -> Any:
    """transformers' model of a config.json, with initial weights."""
    parsed = transformers.AutoConfig.for_model(**config)
    loader = getattr(transformers, family_of(config).LOADER)
    return loader.from_config(parsed) if hasattr(loader, "from_config") else loader(parsed)


def weight_bytes(step: nn.Module) -> int:
    """Bytes of the weights that a step multiplies by; shared weights count once, embeddings only if they are the head too."""
    embeddings = {id(m.weight) for m in step.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in step.modules() if isinstance(m, nn.Linear)}
    weights = {id(w): w for w in step.parameters()}
    return sum(_size(w) for key, w in weights.items() if key in multiplied or key not in embeddings)


def _slot_tensors(
    encoded: tuple[Tensor, ...], slots: int, entries: int, *, prefixed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    prefix = encoded[0].shape[2] if prefixed else 0
    memory = [] if prefixed else [x.new_zeros(slots, *x.shape[1:]) for x in encoded]
    return memory, [x.new_zeros(slots, x.shape[1], prefix + entries, x.shape[3]) for x in encoded]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
