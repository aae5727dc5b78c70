"""What travels through a run: an entry, then its pixels, then its captions; or, at any point, its failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads this file, and is quick without numpy
    import numpy as np
    import numpy.typing as npt

FACTS = ("width", "height", "format", "mode", "bytes", "sha256")  # what can be asked for of an image's file
Facts = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that a source lists.

    `name` is what it is recorded under, `path` what is opened. Both may hold any bytes but NUL: those that are not UTF-8
    are lone surrogates (`os.fsdecode`). `encoder_ids` are the token ids that the
    encoder reads beside this image; empty: those of the run's settings.
    """

    name: str
    path: str
    encoder_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image as the captioner takes it: `pixels` uint8 [height, width, 3], before rescaling and normalisation.

    Where images are encoded anew, to be stored, `pixels` is the new file's bytes, uint8 [n].

    `facts` holds what was asked for of the file itself (`width`, `height`, `sha256`, ...), the size after orientation.
    `encoder_ids` are those of the entry.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    facts: Facts = field(default_factory=dict)
    encoder_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """One caption of an image; `score` is the mean raw log-probability of its tokens, the end token included."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Caption:
    """The captions of one image, best first; never empty."""

    name: str
    candidates: tuple[Candidate, ...]
    facts: Facts = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.candidates[0].text

    @property
    def score(self) -> float:
        return self.candidates[0].score


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be captioned: `error` is one word for programs, `message` one line for people."""

    name: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An image inside a dataset on disk: its file's bytes are in row `row` of the split in `folder`, in `column`."""

    folder: str
    row: int
    column: str = "image"


@dataclass(frozen=True, slots=True)
class Annotated:
    """An image with its captions, as annotations give it.

    `name` is what the annotations call it (COCO's `file_name`, a table's cell), and `image` where it is: a path, a row of
    a dataset on disk, or None where nothing looked for it (references). `captions` holds no empty one and may be empty
    itself. `split` is "train", "val", "test", or None where the annotations do not say. `tags` are words on the image.
    """

    name: str
    image: str | Stored | None
    captions: tuple[str, ...]
    split: str | None = None
    tags: str = ""
