"""What `capcli evaluate` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from capcli.errors import UsageError


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """One or two files of `captions` (`-` is standard input) to hold against `references`, all of which count together.

    `image_column` and `caption_column` name columns of the references, the captions, or both; `split` takes the
    references of one split only. `tokenize` None goes by the references' script. `without_java` leaves METEOR out and
    tokenizes in Python. `bootstrap` asks for 95 % intervals from `resamples` draws with `seed`. `per_image` is a CSV to
    write, `json` asks for JSON in place of a table.
    """

    captions: tuple[str, ...]
    references: tuple[str, ...]
    image_column: str | None = None
    caption_column: str | None = None
    split: str | None = None
    tokenize: Literal["ptb", "characters"] | None = None
    without_java: bool = False
    bootstrap: bool = False
    resamples: int = 1000
    seed: int = 0
    per_image: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.captions) <= 2:
            raise UsageError(f"{len(self.captions)} files of captions were given: give one, or two to compare")
        if self.captions == ("-", "-"):
            raise UsageError("standard input can be read only once: '-' was given twice")
        if not self.references:
            raise UsageError("no references were given: --references FILE says what people wrote of the images")
        if self.resamples < 1:
            raise UsageError(f"resamples is {self.resamples}; it must be 1 or more")
