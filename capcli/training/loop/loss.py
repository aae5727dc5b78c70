"""Cross-entropy over the tokens of a batch: the end token counts, padding does not."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from capcli.models.families import IGNORED, last_logits


def token_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, label_smoothing: float = 0.0
) -> Tensor:
    """The summed cross-entropy of `labels` [B, T] under the last T of `outputs.logits`, divided by the number of tokens.

    `num_items_in_batch` is the number of tokens of the whole update, over its accumulation steps and processes, so that the
    losses of its batches add up to the mean over all tokens, however the update is split. (transformers' loss for
    VisionEncoderDecoderModel divides by the tokens of one batch, and the Trainer then does not divide by the number of
    batches.) None: the number of tokens in `labels`.
    """
    total = token_sum(last_logits(outputs, labels.shape[1]), labels, label_smoothing)
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    if not isinstance(count, Tensor):
        return total / max(count, 1)
    return total / count.to(total.device).clamp(min=1)  # a batch whose images all failed to load gives 0, not NaN


def token_sum(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The summed cross-entropy of `labels` [B, T] under `logits` [B, T, V], in float32, without IGNORED labels."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
