"""Options of `capcli evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError
from capcli.options.limits import NonNegativeInt, PositiveInt, check_limits


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Compare any number of files of `captions` (`-` is standard input) with `references`, which are merged.

    `image_column` and `caption_column` name columns of the references, the captions, or both. `split` takes the
    references of one split only. `tokenize` None is chosen by the script of the references. `without_java` omits METEOR
    and tokenizes in Python. `bootstrap` adds 95 % confidence intervals from `resamples` resamples drawn with `seed`.
    `per_image` is a CSV file to write. `json` prints JSON instead of a table.
    """

    captions: tuple[str, ...]
    references: tuple[str, ...]
    image_column: str | None = None
    caption_column: str | None = None
    split: Literal["train", "val", "test"] | None = None
    tokenize: Literal["ptb", "characters"] | None = None
    without_java: bool = False
    bootstrap: bool = False
    resamples: PositiveInt = 1000
    seed: NonNegativeInt = 0
    per_image: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.captions:
            raise UsageError("no captions were given: name a file of captions")
        if self.captions.count("-") > 1:
            raise UsageError("standard input can be read only once: '-' was given twice")
        if not self.references:
            raise UsageError("no references were given: name a file of reference captions with --references")
