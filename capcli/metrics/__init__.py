"""Scores of captions against references: BLEU, METEOR, ROUGE-L and CIDEr, as COCO reports them."""

from capcli.metrics.scorer import Scorer, score_captions

__all__ = ["Scorer", "score_captions"]
