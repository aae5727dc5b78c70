"""`survey` on CUDA: a Triton kernel that reads every logit once and writes one number for each block.

The sum is kept as online softmax keeps it (Milakov and Gimelshein, 2018): anew from the old one whenever the peak rises.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOGETHER = 16  # blocks that a program reads at a time
LOWEST = tl.constexpr(-3.0e38)  # a peak to begin with: from -inf there would be no distance


# Triton reads annotations, and knows none but its own; its interpreter (3.6) makes no numbers of what is not constexpr.
@triton.jit  # type: ignore[untyped-decorator]
def read_row(  # type: ignore[no-untyped-def]
    logits, best, peak, log_sum, count: tl.constexpr, whole: tl.constexpr, block: tl.constexpr, together: tl.constexpr
):
    """One program for each row of `count` logits, of which `whole` blocks are full."""
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
    """Of logits [N, V]: best [N, whole blocks of `block` logits], peak [N, 1] and log_sum [N, 1], float32."""
    rows = rows.contiguous()
    count, whole = rows.shape[1], rows.shape[1] // block
    best, peak, log_sum = (rows.new_empty(len(rows), n, dtype=torch.float32) for n in (whole, 1, 1))
    with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]  # kernels start on the current device
        read_row[(len(rows),)](rows, best, peak, log_sum, count, whole, block, TOGETHER)
    return best, peak, log_sum
