"""What `capcli evaluate` measures: matched captions, the scores of each file, and the comparison of several files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from capcli.metrics.bootstrap import Interval
from capcli.metrics.scorer import Scores

MEASURES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")


@dataclass(frozen=True)
class Matched:
    """One file's captions of images that have references, by the name in the references.

    `file_names` are the names in the file itself. The counts are of images left out on either side; `failed` of those with
    references that could not be captioned.
    """

    path: str
    texts: Mapping[str, str]
    file_names: Mapping[str, str]
    captions_without_references: int
    references_without_caption: int
    failed: int = 0


@dataclass(frozen=True, eq=False)
class FileScores:
    """One file's `scores`, and all `figures` by name in the order of the table."""

    matched: Matched
    scores: Scores
    figures: Mapping[str, float]
    intervals: Mapping[str, Interval] | None = None


@dataclass(frozen=True, eq=False)
class Difference:
    """The figures of a file minus those of the first, by name."""

    figures: Mapping[str, float]
    intervals: Mapping[str, Interval] | None = None


@dataclass(frozen=True, eq=False)
class Result:
    """The measured files, the settings, and the `differences` of the second and each further file to the first."""

    measured: Sequence[FileScores]
    tokenize: str
    tokenizer: str
    resamples: int | None
    seed: int
    differences: Sequence[Difference] = ()
