"""The ceiling: what a captioner's own arithmetic and bytes cost at the peak rates of this machine, as measured here."""

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
from capcli.models.checkpoint import modules, quiet_transformers
from capcli.models.dtypes import DTYPES
from capcli.models.families import family_of
from capcli.models.int8 import Int8Linear
from capcli.models.model_files import ModelFiles
from capcli.models.packing import PackedLinear, can_pack
from capcli.pixels import PixelSpec

SECONDS = 0.6  # of measuring each rate
SIDE = 2048  # of the square matrices multiplied
READ = 1 << 28  # bytes read at a time: more than any cache holds


@dataclass(frozen=True, slots=True)
class Rates:
    """The peak rates of a device: floating-point operations a second in matrix products, bytes a second read."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class CaptionCost:
    """What captions cost: operations to encode an image; operations and bytes of one step over all slots, of mean length."""

    encode_flops: float
    step_flops: float
    step_bytes: float
    slots: int

    def images_per_second(self, rates: Rates, tokens: float) -> float:
        """With captions of so many tokens: no step is faster than its products nor than its bytes."""
        step = max(self.step_flops / rates.flops, self.step_bytes / rates.bandwidth)
        return 1 / (self.encode_flops / rates.flops + tokens * step / self.slots)


def peak_rates(device: torch.device, dtype: str) -> Rates:
    """The best of some seconds."""
    kind = DTYPES[dtype]
    if dtype == "int8":
        return Rates(2 * SIDE**3 / fastest(product_in_int8(), device), bandwidth(device))
    left = torch.randn(SIDE, SIDE, device=device).to(kind)
    right = torch.randn(SIDE, SIDE, device=device).to(kind)
    products: list[Callable[[], Any]] = [lambda: left @ right]
    if device.type == "cpu" and can_pack(kind):
        packed = PackedLinear(right, None, gelu=False)
        products.append(lambda: packed(left))
    flops = max(2 * SIDE**3 / fastest(each, device) for each in products)
    return Rates(flops, bandwidth(device))


def product_in_int8() -> Callable[[], Any]:
    layer = Int8Linear(torch.randn(SIDE, SIDE), None, gelu=None, fine=False)
    whole = torch.randint(-127, 128, (SIDE, SIDE)).float()
    return lambda: layer.product(whole)


def bandwidth(device: torch.device) -> float:
    block = torch.ones(READ // 4, device=device)
    return READ / fastest(lambda: block.sum(), device)


def fastest(do: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the quickest repetition."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        began = time.perf_counter()
        do()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return best


def cost_of(files: ModelFiles, size: tuple[int, int], settings: Settings, slots: int, dtype: str) -> CaptionCost:
    """Counted on the captioner's modules without weights, at half of the longest caption's entries."""
    with torch.device("meta"), quiet_transformers():
        whole = unfilled(files.config).to(DTYPES[dtype]).eval()
        whole.set_attn_implementation("eager")  # whose products are counted on any device
    encode, step = modules(whole, PixelSpec.from_config(files.processor))
    encoder_ids = (
        (torch.zeros(1, len(settings.encoder_ids), dtype=torch.long, device="meta"),) if settings.encoder_ids else ()
    )
    with torch.inference_mode(), FlopCounterMode(display=False) as encoding:
        seen = encode(torch.zeros(1, *size, 3, dtype=torch.uint8, device="meta"), *encoder_ids)
    entries = len(settings.prompt) - 1 + settings.rows * max(settings.max_new_tokens // 2, 1)
    memory, pool = _slot(seen, slots, entries, prefixed=encode.prefixed)
    tokens = torch.zeros(slots, settings.rows, dtype=torch.long, device="meta")
    visible = torch.ones(slots, settings.rows, pool[0].shape[2], dtype=torch.bool, device="meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as stepping:
        step(tokens, tokens, tokens[:, 0], visible, memory, pool)
    moved = sum(_size(x) for x in (*memory, *pool)) + weight_bytes(step) // (4 if dtype == "int8" else 1)
    return CaptionCost(float(encoding.get_total_flops()), float(stepping.get_total_flops()), float(moved), slots)


def unfilled(config: dict[str, Any]) -> Any:
    """transformers' model of a config.json, its weights as they begin."""
    read = transformers.AutoConfig.for_model(**config)
    loader = getattr(transformers, family_of(config).LOADER)
    return loader.from_config(read) if hasattr(loader, "from_config") else loader(read)


def weight_bytes(step: nn.Module) -> int:
    """Of all that a step multiplies by: matrices once, shared ones too, embeddings only where they are the head as well."""
    looked_up = {id(m.weight) for m in step.modules() if isinstance(m, nn.Embedding)}
    multiplied = {id(m.weight) for m in step.modules() if isinstance(m, nn.Linear)}
    weights = {id(w): w for w in step.parameters()}
    return sum(_size(w) for key, w in weights.items() if key in multiplied or key not in looked_up)


def _slot(seen: tuple[Tensor, ...], slots: int, entries: int, *, prefixed: bool) -> tuple[list[Tensor], list[Tensor]]:
    image = seen[0].shape[2] if prefixed else 0
    memory = [] if prefixed else [x.new_zeros(slots, *x.shape[1:]) for x in seen]
    return memory, [x.new_zeros(slots, x.shape[1], image + entries, x.shape[3]) for x in seen]


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()
