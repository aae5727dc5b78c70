"""Assigns images to training and validation: by lists of names, the annotations' splits, or at random."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from capcli.annotations.data_report import DataReport
from capcli.annotations.image_captions import GatheredImage, normal
from capcli.annotations.image_files import Listings
from capcli.annotations.name_matching import NameIndex, base, composed, stem
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.records import Annotated, Stored
from capcli.sources.lists import open_list
from capcli.text import brief, counted, printable, raw_bytes


def assign_splits(images: Sequence[GatheredImage], options: DataOptions, report: DataReport) -> list[GatheredImage]:
    """The images to use, their split set to train or val; test images, and those in none of the lists, are left out.

    The lists of names take precedence; without them the annotations apply, unless an option selects validation images.
    Raises CapcliError where a list and the data have no name in common.
    """
    listed = {
        split: matched(images, path, report)
        for split, path in (("val", options.val_names), ("train", options.train_names))
        if path is not None
    }
    both = listed.get("val", set()) & listed.get("train", set())
    if both:
        first = brief(images[min(both)].name)
        report.notes.append(f"{counted(len(both), 'image')} in both lists, such as {first}: kept for validation")
    by_option = bool(options.val_data or options.val_fraction or options.val_names)
    wanted = []
    for position, image in enumerate(images):
        if position in listed.get("val", ()):
            image.split = "val"
        elif position in listed.get("train", ()):
            image.split = "train"
        else:
            image.split = _unlisted_split(image.split, options, by_option=by_option)
        if image.split is not None:
            wanted.append(image)
    return wanted


def _unlisted_split(split: str | None, options: DataOptions, *, by_option: bool) -> str | None:
    """The split of an image in no list, by that of its annotations; `by_option`: an option selects validation images."""
    if split == "test":
        return None
    if split == "val":
        pooled = options.val_fraction is not None and options.train_names is None
        return ("train" if pooled else None) if by_option else "val"
    return "train" if options.train_names is None else None


def validation_images(images: Sequence[GatheredImage]) -> list[GatheredImage]:
    """Of the images of `val_data` those that are val or in no split, or all where there are none."""
    return [image for image in images if image.split in ("val", None)] or list(images)


def matched(images: Sequence[GatheredImage], path: str, report: DataReport) -> set[int]:
    """The positions of the images in the list at `path`, by name, or by another form of it that only one image has: in
    Unicode's composed form, without folders, or without the suffix too.

    Raises CapcliError where no name matches, and UsageError where the file is not a list. A note in the report counts
    names without an image.
    """
    names = [entry.name for entry in open_list(path, null=False)]
    if not names:
        raise CapcliError(f"{printable(path)} lists no image")
    positions: dict[str, list[int]] = {}
    for position, image in enumerate(images):
        positions.setdefault(normal(image.name), []).append(position)
    index = NameIndex(positions, (composed, base, stem))
    found: set[int] = set()
    unknown: list[str] = []
    for name in filter(str.strip, names):
        given = normal(name)
        match = index.find(given if given in index else normal(name.strip()))
        if match is None:
            unknown.append(name)
        else:
            found.update(positions[match])
    if not found:
        example = brief(images[0].name) if images else "no image"
        raise CapcliError(
            f"{printable(path)} and the data have no image in common: {brief(names[0])} in the list, "
            f"{example} in the data"
        )
    if unknown:
        some = f"{len(unknown):,} of {counted(len(names), 'name')} in {printable(path)}"
        report.notes.append(f"{some} not found in the data, such as {brief(unknown[0])}")
    return found


def without(images: Sequence[Annotated], others: Sequence[Annotated], report: DataReport) -> list[Annotated]:
    """The images that are not among the others; a note in the report counts those that are."""
    listings = Listings()
    taken = {_identity(image, listings) for image in others}
    kept = [image for image in images if _identity(image, listings) not in taken]
    if len(kept) < len(images):
        report.notes.append(f"{counted(len(images) - len(kept), 'image')} in the validation data too: not trained on")
    return kept


def _identity(image: Annotated, listings: Listings) -> object:
    if isinstance(image.image, Stored):
        return os.path.realpath(image.image.folder), image.image.row
    return listings.identity(image.image or image.name)


def draw(images: Sequence[Annotated], amount: float, seed: int, purpose: str) -> list[bool]:
    """For each image whether it is drawn: `amount` of them or, below 1, that share, and at least one.

    An image's rank in the draw is a hash of its name, the seed and the purpose. So the order of the images does not
    matter, and adding images changes few of the draws.
    """
    wanted = max(1, round(len(images) * amount)) if amount < 1 else int(amount)
    if wanted >= len(images):
        return [True] * len(images)
    ranks = np.fromiter((_rank(image.name, seed, purpose) for image in images), np.uint64, len(images))
    last = np.partition(ranks, wanted - 1)[wanted - 1]
    drawn: list[bool] = (ranks < last).tolist()
    equal = np.flatnonzero(ranks == last).tolist()  # images of one name, in several folders
    for position in sorted(equal, key=lambda position: str(images[position].image))[: wanted - sum(drawn)]:
        drawn[position] = True
    return drawn


def _rank(name: str, seed: int, purpose: str) -> int:
    return int.from_bytes(blake2b(raw_bytes(f"{seed} {purpose} {normal(name)}"), digest_size=8).digest(), "big")


def draw_validation(images: Sequence[Annotated], share: float, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """Training and validation images, drawn at random: at least one of each, unless there is only one image."""
    if len(images) < 2:
        return list(images), []
    drawn = draw(images, share, seed, "validation")
    if all(drawn):
        drawn[0] = False
    train = [image for image, is_drawn in zip(images, drawn, strict=True) if not is_drawn]
    return train, [image for image, is_drawn in zip(images, drawn, strict=True) if is_drawn]


def limited(images: list[Annotated], limit: float | None, seed: int) -> list[Annotated]:
    """`limit` of the images, or that share of them (below 1), drawn at random; None: all."""
    if limit is None or not images:
        return images
    drawn = draw(images, limit, seed, "limit")
    return [image for image, kept in zip(images, drawn, strict=True) if kept]


def marked(images: Iterable[Annotated], split: str) -> Iterator[Annotated]:
    for image in images:
        yield image if image.split == split else replace(image, split=split)


@dataclass(frozen=True)
class Split:
    """Images to train on, images to validate on, and a report of what was left out. No image is in both lists; either may
    be empty."""

    train: list[Annotated]
    val: list[Annotated]
    report: DataReport
