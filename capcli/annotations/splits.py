"""Which images are trained on and which validate: by lists of names, by what the annotations say, or drawn by image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from capcli.annotations.data_report import DataReport
from capcli.annotations.image_files import Listings
from capcli.annotations.images import Image, normal
from capcli.errors import CapcliError
from capcli.options import DataOptions
from capcli.records import Annotated, Stored
from capcli.sources.lists import open_list
from capcli.text import brief, counted, printable, raw_bytes


def sorted_out(images: Sequence[Image], options: DataOptions, report: DataReport) -> list[Image]:
    """The images that are to be used, their split set to train or val; what no list names, and test, is left out.

    The lists of names decide where they are given; then what the annotations say, where nothing else names what
    validates. Raises CapcliError where a list and the data have no name in common.
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
    elsewhere = bool(options.val_data or options.val_fraction or options.val_names)
    wanted = []
    for position, image in enumerate(images):
        if position in listed.get("val", ()):
            image.split = "val"
        elif position in listed.get("train", ()):
            image.split = "train"
        else:
            image.split = _by_itself(image.split, options, elsewhere=elsewhere)
        if image.split is not None:
            wanted.append(image)
    return wanted


def _by_itself(split: str | None, options: DataOptions, *, elsewhere: bool) -> str | None:
    """What an image is for that no list names; `elsewhere`: something else than the annotations says what validates."""
    if split == "test":
        return None
    if split == "val":
        pooled = options.val_fraction is not None and options.train_names is None
        return ("train" if pooled else None) if elsewhere else "val"
    return "train" if options.train_names is None else None


def validating(images: Sequence[Image]) -> list[Image]:
    """Of data that were given to validate on: what they say is for that, or all where they say so of nothing."""
    return [image for image in images if image.split in ("val", None)] or list(images)


def matched(images: Sequence[Image], path: str, report: DataReport) -> set[int]:
    """The positions of the images that the list at `path` names: as the data do, else by file name or stem where only
    one image has it. Raises CapcliError, with a name of each, where none does, and UsageError where it is no list."""
    names = [entry.name for entry in open_list(path, null=False)]
    if not names:
        raise CapcliError(f"{printable(path)} lists no image")
    exact: dict[str, list[int]] = {}
    for position, image in enumerate(images):
        exact.setdefault(normal(image.name), []).append(position)
    found: set[int] = set()
    unknown: list[str] = []
    for name in names:
        positions = exact.get(normal(name)) or exact.get(normal(name.strip()))
        found.update(positions or ())
        if not positions and name.strip():
            unknown.append(name)
    if unknown:
        unknown = _match_loosely(unknown, exact, found)
    if not found:
        example = brief(images[0].name) if images else "no image at all"
        raise CapcliError(
            f"{printable(path)} and the data have no image in common: {brief(names[0])} in the list, "
            f"{example} in the data"
        )
    if unknown:
        of = f"{len(unknown):,} of {counted(len(names), 'name')} in {printable(path)}"
        report.notes.append(f"{of} not found in the data, such as {brief(unknown[0])}")
    return found


def _match_loosely(names: Sequence[str], exact: Mapping[str, Sequence[int]], found: set[int]) -> list[str]:
    """Adds to `found` what names without their folders, or without their suffixes, tell; gives the names that remain."""
    bare = {key: _alone((how(name), positions) for name, positions in exact.items()) for key, how in _LOOSER.items()}
    remaining = []
    for name in names:
        keys = ((key, how(normal(name.strip()))) for key, how in _LOOSER.items())
        position = next((bare[key][short] for key, short in keys if short in bare[key]), None)
        if position is None:
            remaining.append(name)
        else:
            found.add(position)
    return remaining


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


_LOOSER: dict[str, Callable[[str], str]] = {"file name": os.path.basename, "stem": _stem}


def _alone(pairs: Iterable[tuple[str, Sequence[int]]]) -> dict[str, int]:
    """The keys that one image alone has."""
    found: dict[str, int | None] = {}
    for key, positions in pairs:
        found[key] = None if key in found or len(positions) > 1 else positions[0]
    return {key: position for key, position in found.items() if position is not None}


def without(images: Sequence[Annotated], others: Sequence[Annotated], report: DataReport) -> list[Annotated]:
    """The images that are none of the others."""
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

    Each image has its place in the draw by its name, the seed and the purpose: the order in which the images are
    listed does not matter, and few change sides where images are added.
    """
    wanted = max(1, round(len(images) * amount)) if amount < 1 else int(amount)
    if wanted >= len(images):
        return [True] * len(images)
    ranks = np.fromiter((_rank(image.name, seed, purpose) for image in images), np.uint64, len(images))
    last = np.partition(ranks, wanted - 1)[wanted - 1]
    drawn: list[bool] = (ranks < last).tolist()
    level = np.flatnonzero(ranks == last).tolist()  # images of one name, in several folders
    for position in sorted(level, key=lambda position: str(images[position].image))[: wanted - sum(drawn)]:
        drawn[position] = True
    return drawn


def _rank(name: str, seed: int, purpose: str) -> int:
    return int.from_bytes(blake2b(raw_bytes(f"{seed} {purpose} {normal(name)}"), digest_size=8).digest(), "big")


def set_aside(images: Sequence[Annotated], share: float, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """Training and validation images, drawn by image: at least one of each, or training alone of a single image."""
    if len(images) < 2:
        return list(images), []
    drawn = draw(images, share, seed, "validation")
    if all(drawn):
        drawn[0] = False
    train = [image for image, out in zip(images, drawn, strict=True) if not out]
    return train, [image for image, out in zip(images, drawn, strict=True) if out]


def limited(images: list[Annotated], limit: float | None, seed: int) -> list[Annotated]:
    if limit is None or not images:
        return images
    drawn = draw(images, limit, seed, "limit")
    return [image for image, kept in zip(images, drawn, strict=True) if kept]


def marked(images: Iterable[Annotated], split: str) -> Iterator[Annotated]:
    for image in images:
        yield image if image.split == split else replace(image, split=split)


@dataclass(frozen=True)
class Split:
    """Images to train on and images to validate on, and what was left out. No image is in both; either may be empty."""

    train: list[Annotated]
    val: list[Annotated]
    report: DataReport
