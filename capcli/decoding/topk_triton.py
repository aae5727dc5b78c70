"""`summarize_logits` on CUDA: a Triton kernel that reads every logit once and writes one number per block.

The sum is that of online softmax (Milakov and Gimelshein, 2018): it is rescaled whenever the maximum rises. In a file of its own,
because importing it needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOGETHER = 16  # blocks that a program reads per iteration
LOWEST = tl.constexpr(-3.0e38)  # the first maximum: a difference from -inf would be NaN


# Triton reads annotations and accepts only its own; its interpreter (3.6) needs constexpr for every plain number.
@triton.jit  # type: ignore[untyped-decorator]
def read_row(  # type: ignore[no-untyped-def]
    logits, best, peak, log_sum, count: tl.constexpr, whole: tl.constexpr, block: tl.constexpr, together: tl.constexpr
):
    """One program per row of `count` logits with `whole` whole blocks."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, together)
    within = number[:, None] * block + tl.arange(0, block)[None, :]
    high = LOWEST
    total = 0.0
    for first in range(0, count, together * block):
        at = first + within
        x = tl.load(logits + row * count + at, mask=at < count, other=-float("inf")).to(tl.float32)
        most = tl.max(x, 1)
        tl.store(best + row * whole + first // block + number, most, mask=first // block + number < whole)
        higher = tl.maximum(high, tl.max(most, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.sum(tl.exp(x - higher), 1), 0)
        high = higher
    tl.store(peak + row, high)
    tl.store(log_sum + row, tl.log(total))


def summarize_rows(rows: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] -> best [N, V // block], peak [N, 1] and log_sum [N, 1], all float32."""
    rows = rows.contiguous()
    count, whole = rows.shape[1], rows.shape[1] // block
    best, peak, log_sum = (rows.new_empty(len(rows), n, dtype=torch.float32) for n in (whole, 1, 1))
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]  # kernels start on the current device
        read_row[(len(rows),)](rows, best, peak, log_sum, count, whole, block, TOGETHER)
    return best, peak, log_sum
