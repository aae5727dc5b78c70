"""Sampling noise that depends only on the seed, the image's name, the step, the row and the token.

Order, batch and resumption therefore change no caption. A draw from softmax(x) is the largest of x + Gumbel noise, and k draws
without replacement are its k largest values (Kool et al., 2019, "Stochastic Beams and Where to Find Them").
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's constants as int64, which wraps around
_MIX_A = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_B = 0x94D049BB133111EB - (1 << 64)


def key(seed: int, name: str) -> int:
    """A signed 64-bit key for one image's noise."""
    digest = hashlib.blake2b(
        name.encode("utf-8", "surrogateescape"), digest_size=8, salt=(seed % (1 << 64)).to_bytes(8, "big")
    )
    return int.from_bytes(digest.digest(), "big", signed=True)


def gumbel(keys: torch.Tensor, steps: torch.Tensor, rows: int, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [S, rows, vocabulary], for `keys` int64 [S] at `steps` int64 [S]."""
    row = torch.arange(rows, device=keys.device)
    stream = mix(mix(keys + steps * _GOLDEN)[:, None] + row * _GOLDEN)  # [S, rows]
    token = torch.arange(vocabulary, device=keys.device)
    bits = mix(stream[:, :, None] + token * _GOLDEN) >> 32 & 0xFFFFFFFF  # [S, rows, vocabulary]
    # The largest values come from small u, where u keeps its precision; the cap keeps log1p finite at the other end.
    u = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele et al., 2014) on int64. The masks clear the sign bits that an arithmetic shift adds."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _MIX_A
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _MIX_B
    return x ^ (x >> 31 & 0x1FFFFFFFF)
