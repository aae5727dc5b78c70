"""Scores of captions against references: of the corpus, of each image, and the counts to score a resample from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capcli.errors import CapcliError
from capcli.metrics import tokenization
from capcli.metrics.java import Meteor, package_folder
from capcli.metrics.tokenization import TOKENIZERS, Tokenize

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
TokenizeAll = Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one set of captions.

    `corpus` has a score for each measure, `per_image` an array [images] in the order of `names`. BLEU and METEOR of a corpus
    are not means over the images: they are computed from summed counts, which are in `bleu_counts` (in pycocoevalcap's
    format) and `meteor_counts` [images, 23]. `tokens` are the tokenized captions.
    """

    names: tuple[str, ...]
    tokens: Mapping[str, str]
    corpus: Mapping[str, float]
    per_image: Mapping[str, npt.NDArray[np.float64]]
    bleu_counts: Sequence[Mapping[str, Any]]
    meteor_counts: npt.NDArray[np.float64] | None = None


class Scorer:
    """Scores captions of images by BLEU-1 to 4, ROUGE-L and CIDEr-D, as COCO reports them, without Java.

    `references` are the reference captions by image name; they are tokenized once. `tokenize` is `ptb` or `characters`
    (Chinese, Japanese and other scripts without spaces); None chooses by the references. `tokenize_all` replaces the
    tokenizer. The measures are pycocoevalcap's; raises CapcliError where that is not installed.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        tokenize: Tokenize | None = None,
        *,
        tokenize_all: TokenizeAll | None = None,
    ) -> None:
        package_folder("bleu")
        self.tokenize = tokenize or tokenization.choose_tokenizer(text for each in references.values() for text in each)
        one = TOKENIZERS[self.tokenize]
        self._tokenize_all = tokenize_all or (lambda texts: [one(text) for text in texts])
        flat = iter(self._tokenize_all([text for each in references.values() for text in each]))
        self._references = {name: [next(flat) for _ in each] for name, each in references.items() if each}

    def score(self, captions: Mapping[str, str]) -> dict[str, float]:
        """`Bleu_1` to `Bleu_4`, `ROUGE_L` and `CIDEr` of the images that have both a caption and a reference.

        CIDEr's document frequencies are those of these images' references. Raises CapcliError where there are no such images.
        """
        return dict(self.measure(captions).corpus)

    def measure(self, captions: Mapping[str, str], meteor: Meteor | None = None) -> Scores:
        """`score` with per-image scores and counts, and with METEOR if given."""
        names = tuple(name for name in captions if name in self._references)
        if not names:
            raise CapcliError("no captioned image has references")
        tokens = dict(zip(names, self._tokenize_all([captions[name] for name in names]), strict=True))
        references = {name: self._references[name] for name in names}
        given = {name: [caption] for name, caption in tokens.items()}
        corpus, per_image, bleu_counts = bleu(references, given)
        meteor_counts = None
        if meteor is not None:
            meteor_counts, corpus["METEOR"], per_image["METEOR"] = score_meteor(meteor, references, tokens)
        for measure, (whole, each) in rouge_and_cider(references, given).items():
            corpus[measure], per_image[measure] = float(whole), each
        return Scores(names, tokens, corpus, per_image, bleu_counts, meteor_counts)


def score_captions(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """`Scorer(references).score(captions)`, where the references are used only once."""
    return Scorer(references).score(captions)


References = Mapping[str, Sequence[str]]


def bleu(
    references: References, given: References
) -> tuple[dict[str, float], dict[str, npt.NDArray[np.float64]], list[dict[str, Any]]]:
    import numpy as np
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for name, each in references.items():
        scorer += (given[name][0], list(each))
    whole, per_image = scorer.compute_score(option="closest")
    return (
        dict(zip(BLEU, map(float, whole), strict=True)),
        dict(zip(BLEU, map(np.asarray, per_image), strict=True)),
        scorer.ctest,
    )


def rouge_and_cider(references: References, given: References) -> dict[str, tuple[float, npt.NDArray[np.float64]]]:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    return {
        "ROUGE_L": Rouge().compute_score(references, given),
        "CIDEr": Cider().compute_score(references, given),
    }


def score_meteor(
    meteor: Meteor, references: References, tokens: Mapping[str, str]
) -> tuple[npt.NDArray[np.float64], float, npt.NDArray[np.float64]]:
    """Each image's counts [images, 23], the score of the corpus, and each image's score [images]."""
    import numpy as np

    counts = np.array([meteor.statistics(tokens[name], references[name]) for name in references])
    *each, whole = meteor.scores([*counts.tolist(), counts.sum(axis=0).tolist()])
    return counts, whole, np.array(each)
