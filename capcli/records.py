"""The records of a run: an entry, the loaded image, its captions; a failure in place of any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module and must not import NumPy
    import numpy as np
    import numpy.typing as npt

FACTS = ("width", "height", "format", "mode", "bytes", "sha256")  # properties of an image file that a row can contain
Facts = Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file before it is read: its size in bytes, its time in nanoseconds, and a hash of its content, 0 if unknown."""

    size: int
    modified: int
    hash: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that a source lists.

    `name` is the image's name in the output, `path` the file to open. Both may contain any bytes but NUL; those that are not
    UTF-8 are lone surrogates (`os.fsdecode`). `encoder_ids` holds the token ids that the encoder reads with this image, for
    example of its tags; without any, those of the run's settings apply. `prompt` is the prompt for this image; None: the run's.
    An entry with a `failure` is not read: it has failed already, as a folder that cannot be listed, whose name ends with `/`.
    `stamp` is the state of its file when it was listed.
    """

    name: str
    path: str
    encoder_ids: tuple[int, ...] = ()
    prompt: str | None = None
    failure: Failure | None = None
    stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """An image as the captioner takes it: `pixels` uint8 [height, width, 3], before rescaling and normalization.

    Where images are encoded again to be stored, `pixels` is the content of the new file, uint8 [n]. `facts` holds the
    requested properties of the original file (`width`, `height`, `sha256`, ...), the size after orientation. `encoder_ids` and
    `prompt` are those of the entry.
    """

    name: str
    pixels: npt.NDArray[np.uint8]
    facts: Facts = field(default_factory=dict)
    encoder_ids: tuple[int, ...] = ()
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One caption of an image.

    `score` is the mean raw log-probability of its tokens, the end token included; None where a server gives none.
    """

    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Caption:
    """The captions of one image, best first; at least one."""

    name: str
    candidates: tuple[Candidate, ...]
    facts: Facts = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The text of the best caption."""
        return self.candidates[0].text

    @property
    def score(self) -> float | None:
        """The score of the best caption."""
        return self.candidates[0].score


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be captioned. `error` is a machine-readable code, `message` one line of text."""

    name: str
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class Stored:
    """An image in a dataset on disk: the bytes of its file are in row `row` and column `column` of the split in `folder`."""

    folder: str
    row: int
    column: str = "image"


@dataclass(frozen=True, slots=True)
class Annotated:
    """An image with its captions, as read from annotations.

    `name` is the name in the annotations (COCO's `file_name`, a cell of a table). `image` is where the image is: a path, a
    row of a dataset on disk, or None if it was not looked up (references). `captions` contains no empty caption, and may be
    empty itself. `split` is "train", "val", "test", or None if the annotations do not state it. `tags` is text that
    describes the image.
    """

    name: str
    image: str | Stored | None
    captions: tuple[str, ...]
    split: str | None = None
    tags: str = ""
