"""How far chance may have made a score: 95 % intervals by the percentile bootstrap over images.

Images are drawn with replacement, as many as there are, and the corpus is scored anew: BLEU and METEOR from the counts of
the images drawn, ROUGE-L and CIDEr as the means of theirs. CIDEr's document frequencies stay those of the whole set, as
if they were given: they weigh words and are not what is measured. Two sets of captions are compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from capcli.metrics.java import Meteor
from capcli.metrics.scorer import BLEU, Scores

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Interval = tuple[float, float]
AT_ONCE = 1 << 22  # weights held at a time


def resample(
    scores: Sequence[Scores], meteor: Meteor | None, resamples: int, seed: int
) -> list[dict[str, npt.NDArray[np.float64]]]:
    """Each measure's score [resamples] for each of `scores`, which are of the same images and drawn together."""
    import numpy as np

    drawn: list[dict[str, list[npt.NDArray[np.float64]]]] = [{} for _ in scores]
    counts = [_bleu_table(each) for each in scores]
    for weights in _draws(len(scores[0].names), resamples, seed):  # [some, images]
        for each, table, into in zip(scores, counts, drawn, strict=True):
            for measure, values in _rescored(each, table, weights, meteor).items():
                into.setdefault(measure, []).append(values)
    return [{measure: np.concatenate(parts) for measure, parts in each.items()} for each in drawn]


def intervals(drawn: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Interval]:
    """Between the 2.5th and the 97.5th percentile of each measure's resamples."""
    import numpy as np

    found = {}
    for measure, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        found[measure] = (float(low), float(high))
    return found


def _draws(images: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each image is drawn: arrays [some, images], `resamples` rows in all."""
    import numpy as np

    random = np.random.default_rng(seed)
    some = max(1, AT_ONCE // images)
    for start in range(0, resamples, some):
        rows = (
            np.bincount(random.integers(images, size=images), minlength=images)
            for _ in range(min(some, resamples - start))
        )
        yield np.array(list(rows), dtype=np.float64)


def _rescored(
    scores: Scores, bleu_table: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], meteor: Meteor | None
) -> dict[str, npt.NDArray[np.float64]]:
    import numpy as np

    values = dict(zip(BLEU, _bleu(weights @ bleu_table), strict=True))
    if scores.meteor_counts is not None and meteor is not None:
        values["METEOR"] = np.array(meteor.scores((weights @ scores.meteor_counts).tolist()))
    for measure in ("ROUGE_L", "CIDEr"):
        values[measure] = weights @ scores.per_image[measure] / len(scores.names)
    return values


def _bleu_table(scores: Scores) -> npt.NDArray[np.float64]:
    """What BLEU sums over images, [images, 10]: lengths of caption and closest reference, n-grams said, and right."""
    import numpy as np

    return np.array([_bleu_row(counts) for counts in scores.bleu_counts], dtype=np.float64)


def _bleu_row(counts: Mapping[str, Any]) -> list[int]:
    length = counts["testlen"]
    closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
    return [length, closest, *counts["guess"], *counts["correct"]]


def _bleu(sums: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """BLEU-1 to 4 of each row of sums: pycocoevalcap scores a corpus's sums as it scores one image's counts."""
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    scorer.ctest = [
        {"testlen": row[0], "reflen": [row[1]], "guess": row[2:6], "correct": row[6:10]} for row in sums.tolist()
    ]
    _, each = scorer.compute_score(option="closest")
    return [np.array(values) for values in each]
