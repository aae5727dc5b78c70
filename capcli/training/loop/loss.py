"""Cross-entropy over a batch's real tokens: the end token always counts, padding never."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from capcli.models.families import IGNORED, last_logits


def token_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """The summed cross-entropy of `labels` [B, T] under the last T of `outputs.logits`, divided by the number of tokens.

    `num_items_in_batch` is that number over all that one update learns from: its accumulation steps, on all processes. So
    the parts add up to the mean over the whole, however it is cut. (transformers' loss for VisionEncoderDecoderModel
    divides by the part's own tokens, and its Trainer leaves out the division by the number of parts.) None: the tokens
    of `labels` themselves.
    """
    total = token_sum(last_logits(outputs, labels.shape[1]), labels, label_smoothing)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    if not isinstance(count, Tensor):
        return total / max(count, 1)
    return total / count.to(total.device).clamp(min=1)  # images that all broke teach nothing, and NaN least of all


def token_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The summed cross-entropy of `labels` [B, T] under `logits` [B, T, V], in float32; where they are IGNORED nothing."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
