"""The dtypes that weights are loaded in, the device that an option names, and what this CPU computes in."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from capcli.errors import UsageError
from capcli.options import check_device

# The dtypes in which weights are loaded. int8 weights are quantized from float32 (capcli.models.int8).
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.float32,
}


def cpu_capabilities() -> dict[str, Any]:
    """The CPU's instruction set extensions by PyTorch's names; empty where PyTorch does not report them."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 multiply instructions."""
    capabilities = cpu_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def choose_device(name: str) -> torch.device:
    """The device of a name; `auto` is the first CUDA device, else the CPU. Raises UsageError for a device that does not exist."""
    check_device(name)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: no Metal device can be used here; --device auto takes an available one")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            available = f"this machine has {count}" if count else "no CUDA device can be used here"
            raise UsageError(f"--device {name}: {available}; --device auto takes an available one")
        device = torch.device("cuda", device.index or 0)
    return device
