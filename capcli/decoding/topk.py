"""A summary of a step's logits, computed in one pass: each row's block maxima, its maximum, and the terms of its log-softmax.

From it the top k tokens of a row and their log-probabilities follow without writing another tensor of the vocabulary's size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

BLOCK = 256  # logits per block
CACHED = 1 << 18  # float32 logits per part on a CPU: a part stays in the cache


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """A summary of logits [S, R, V], in float32.

    `best` [S, R, V // BLOCK] are the maxima of the whole blocks. `peak` and `log_sum` [S, R, 1] are such that log_softmax(x) is
    x - peak - log_sum, rounded as PyTorch rounds it.
    """

    best: Tensor
    peak: Tensor
    log_sum: Tensor

    def log_probabilities(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """The log-probabilities, float32, of `tokens` [S, R, K] under the summarised logits."""
        return logits.gather(2, tokens).float() - self.peak - self.log_sum


def summarize_logits(logits: Tensor) -> LogitSummary:
    """Summarises logits [S, R, V] of any floating dtype: on CUDA with one kernel, on a CPU a few rows at a time."""
    rows = logits.flatten(0, 1)
    if logits.device.type == "cpu":
        parts = [by_torch(part.float()) for part in torch.split(rows, max(1, CACHED // rows.shape[1]))]
        found = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    else:
        kernel = (fused() if logits.device.type == "cuda" else None) or by_log_softmax
        found = list(kernel(rows))
    return LogitSummary(*(x.view(*logits.shape[:2], x.shape[1]) for x in found))


Found = tuple[Tensor, Tensor, Tensor]  # best, peak and log_sum of rows [N, V]


def best_of_blocks(rows: Tensor) -> Tensor:
    """The maxima of the whole blocks: [..., V] -> [..., V // BLOCK]."""
    whole = rows.shape[-1] // BLOCK
    return rows[..., : whole * BLOCK].view(*rows.shape[:-1], whole, BLOCK).amax(-1)


def by_torch(rows: Tensor) -> Found:
    """The summary of float32 rows that fit into the cache."""
    best, rest = best_of_blocks(rows), rows[:, rows.shape[1] // BLOCK * BLOCK :]
    peak = torch.cat((best, rest), 1).amax(-1, keepdim=True)
    return best, peak, (rows - peak).exp_().sum(-1, keepdim=True).log_()


def by_log_softmax(rows: Tensor) -> Found:
    """The summary by PyTorch's log_softmax kernel, for devices other than CPUs without Triton."""
    peak = rows.amax(-1, keepdim=True).float()
    return best_of_blocks(rows).float(), peak, -rows.log_softmax(-1, dtype=torch.float32).amax(-1, keepdim=True)


@cache
def fused() -> Callable[[Tensor], Found] | None:
    """The Triton kernel; None where Triton or the C compiler it needs is missing, or its result differs from `by_torch`."""
    try:
        from capcli.decoding.topk_triton import summarize_rows

        by_kernel = partial(summarize_rows, block=BLOCK)
        rows = torch.randn(3, 5 * BLOCK + 7, device="cuda")
        same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(by_kernel(rows), by_torch(rows), strict=True))
    except Exception:  # of any kind: the kernel is only an optimisation
        return None
    return by_kernel if same else None
