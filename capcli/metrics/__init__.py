"""How good captions are: BLEU, METEOR, ROUGE-L and CIDEr against references, as COCO reports them."""

from capcli.metrics.scorer import Scorer, score_captions

__all__ = ["Scorer", "score_captions"]
