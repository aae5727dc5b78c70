"""What this CPU's instructions do."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def cpu_abilities() -> dict[str, Any]:
    """What PyTorch knows of this CPU's instructions; nothing where it does not tell."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told


@cache
def multiplies_bfloat16() -> bool:
    abilities = cpu_abilities()
    return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
