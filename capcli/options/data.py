"""Which images with captions to read, and how they fall into training and validation."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.errors import UsageError
from capcli.text import flag


@dataclass(frozen=True, slots=True)
class DataOptions:
    """Annotations to read.

    `data` and `val_data` name annotation files or folders in any format of `capcli.annotations`; their images are
    looked for below `image_root`, or where the annotations themselves lie. `train_names` and `val_names` are files that
    list image names, one a line; `tags_column` names the column (or key) with words on an image, `split_column` the one that
    says train, val or test; the formats that state splits of their own (Karpathy's, imagefolders with split folders, prepared
    data) need none of these. `val_fraction` draws that share of the images, by image, with `seed`. `val_limit` keeps that many
    validation images (or, below 1, that share of them), drawn with `seed`; `train_limit` likewise. With `label_template` folders
    of images without annotations are read as classes: the caption of an image is the template with its folder's name for {label}.
    """

    data: tuple[str, ...] = ()
    val_data: tuple[str, ...] = ()
    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    split_column: str | None = None
    tags_column: str | None = None
    train_names: str | None = None
    val_names: str | None = None
    val_fraction: float | None = None
    val_limit: float | None = None
    train_limit: float | None = None
    label_template: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UsageError(f"--val-fraction is {self.val_fraction}; it must be between 0 and 1")
        if self.label_template is not None and "{label}" not in self.label_template:
            raise UsageError(f"--label-template is {self.label_template!r}; it must hold {{label}}, the folder's name")
        ways = [name for name in ("val_data", "val_names", "val_fraction") if getattr(self, name)]
        if len(ways) > 1:
            raise UsageError(f"{' and '.join(map(flag, ways))} each say what validates: give one of them")
        for name in ("val_limit", "train_limit"):
            value = getattr(self, name)
            if value is not None and (value <= 0 or (value > 1 and value != int(value))):
                raise UsageError(f"{flag(name)} is {value}; it must be a number of images, or a share of them below 1")
