"""95 % confidence intervals of scores, by the percentile bootstrap over images.

The images are resampled with replacement, and the corpus is scored again: BLEU and METEOR from the summed
counts of the images drawn, ROUGE-L and CIDEr as means over them. CIDEr's document frequencies stay those of the whole set:
they are weights, not measurements. Two sets of captions are compared on the same draws.
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
MAX_WEIGHTS = 1 << 22  # in memory at a time


def resample(
    scores: Sequence[Scores], meteor: Meteor | None, resamples: int, seed: int
) -> list[dict[str, npt.NDArray[np.float64]]]:
    """For each of `scores`, each measure's scores [resamples]. All are of the same images and share the draws."""
    import numpy as np

    drawn: list[dict[str, list[npt.NDArray[np.float64]]]] = [{} for _ in scores]
    tables = [_bleu_table(each) for each in scores]
    for weights in _draws(len(scores[0].names), resamples, seed):  # [rows, images]
        for each, table, into in zip(scores, tables, drawn, strict=True):
            for measure, values in _rescored(each, table, weights, meteor).items():
                into.setdefault(measure, []).append(values)
    return [{measure: np.concatenate(parts) for measure, parts in each.items()} for each in drawn]


def intervals(drawn: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Interval]:
    """The 2.5th and 97.5th percentile of each measure's resamples."""
    import numpy as np

    found = {}
    for measure, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        found[measure] = (float(low), float(high))
    return found


def _draws(images: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.float64]]:
    """How often each image is drawn: arrays [rows, images] with `resamples` rows in total."""
    import numpy as np

    random = np.random.default_rng(seed)
    step = max(1, MAX_WEIGHTS // images)
    for start in range(0, resamples, step):
        rows = (
            np.bincount(random.integers(images, size=images), minlength=images)
            for _ in range(min(step, resamples - start))
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
    """The counts that BLEU sums, [images, 10]: caption length, closest reference length, 4 n-gram totals, 4 matches."""
    import numpy as np

    return np.array([_bleu_row(counts) for counts in scores.bleu_counts], dtype=np.float64)


def _bleu_row(counts: Mapping[str, Any]) -> list[int]:
    length = counts["testlen"]
    closest = min((abs(reference - length), reference) for reference in counts["reflen"])[1]
    return [length, closest, *counts["guess"], *counts["correct"]]


def _bleu(sums: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    """BLEU-1 to 4 of each row of sums; pycocoevalcap scores a row as if it were one image."""
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    scorer.ctest = [
        {"testlen": row[0], "reflen": [row[1]], "guess": row[2:6], "correct": row[6:10]} for row in sums.tolist()
    ]
    _, scores = scorer.compute_score(option="closest")
    return [np.array(values) for values in scores]
