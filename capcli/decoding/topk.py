"""One reading of a step's logits: the best of every block of a row, a row's peak, and the logarithm of its sum.

With them the best few of a row and their log-probabilities cost little more, and nothing as long as a row need be written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

BLOCK = 256  # logits per block
CACHED = 1 << 18  # logits that are read at a time on a CPU, in float32


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """Of logits [S, R, V]: `best` [S, R, B] of each block but the last, if that is shorter; in float32.

    `peak` and `log_sum` [S, R, 1] are such that log_softmax(x) is x - peak - log_sum, and as it rounds it.
    """

    best: Tensor
    peak: Tensor
    log_sum: Tensor

    def log_probabilities(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Those of `tokens` [S, R, K] under the logits that were surveyed, in float32."""
        return logits.gather(2, tokens).float() - self.peak - self.log_sum


def summarize_logits(logits: Tensor) -> LogitSummary:
    """Reads logits [S, R, V] of any floating dtype: on CUDA by one kernel, on a CPU a few rows at a time."""
    rows = logits.flatten(0, 1)
    if logits.device.type == "cpu":
        parts = [by_torch(each.float()) for each in torch.split(rows, max(1, CACHED // rows.shape[1]))]
        found = [torch.cat(each) for each in zip(*parts, strict=True)]
    else:
        kernel = (fused() if logits.device.type == "cuda" else None) or by_log_softmax
        found = list(kernel(rows))
    return LogitSummary(*(each.view(*logits.shape[:2], each.shape[1]) for each in found))


Found = tuple[Tensor, Tensor, Tensor]  # best, peak and log_sum of rows [N, V]


def best_of_blocks(rows: Tensor) -> Tensor:
    """[..., V] -> [..., whole blocks]"""
    whole = rows.shape[-1] // BLOCK
    return rows[..., : whole * BLOCK].view(*rows.shape[:-1], whole, BLOCK).amax(-1)


def by_torch(rows: Tensor) -> Found:
    """Of rows in float32 that a cache holds."""
    best, rest = best_of_blocks(rows), rows[:, rows.shape[1] // BLOCK * BLOCK :]
    peak = torch.cat((best, rest), 1).amax(-1, keepdim=True)
    return best, peak, (rows - peak).exp_().sum(-1, keepdim=True).log_()


def by_log_softmax(rows: Tensor) -> Found:
    """By the kernel that there is for it, where a device has no cache of ours to keep rows in."""
    peak = rows.amax(-1, keepdim=True).float()
    return best_of_blocks(rows).float(), peak, -rows.log_softmax(-1, dtype=torch.float32).amax(-1, keepdim=True)


@cache
def fused() -> Callable[[Tensor], Found] | None:
    """The kernel for CUDA; None where Triton, or the C compiler that it needs, is missing, or it says something else."""
    try:
        from capcli.decoding.topk_triton import summarize_rows

        by_kernel = partial(summarize_rows, block=BLOCK)
        rows = torch.randn(3, 5 * BLOCK + 7, device="cuda")
        same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(by_kernel(rows), by_torch(rows), strict=True))
    except Exception:  # of whatever kind: it is only quicker
        return None
    return by_kernel if same else None
