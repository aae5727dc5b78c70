"""The plan of a prepared copy: the images that the annotations list, cut into shards; equal for equal data and settings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from capcli import __version__
from capcli.annotations import Split, read_split
from capcli.annotations.datasets import is_dataset
from capcli.errors import UsageError
from capcli.options import PrepareOptions
from capcli.progress import warn
from capcli.records import Annotated, Stored
from capcli.sources.dataset_images import address_of
from capcli.storage.run_file import difference
from capcli.text import counted, is_text, printable


def read_data(options: PrepareOptions) -> Split:
    """The images that the annotations list, by split. Raises UsageError and CapcliError as `read_split` does."""
    data = options.data
    if options.url_column is not None:
        data = replace(data, image_column=options.url_column)
    # A missing file is an image that cannot be read: it stays in the plan, in case the file is restored.
    split = read_split(data, locate=options.url_column is None, keep_missing=True)
    if not options.quiet:
        for note in split.report.notes:
            warn(note)
    return split


def refuse_overwriting_data(options: PrepareOptions, data: Split, written: Iterable[str]) -> None:
    """Raises UsageError where a file that is read is, by any path or link, one of the files that are `written`."""
    files = set(map(os.path.realpath, written))
    given = options.data
    paths = [*given.data, *given.val_data, *filter(None, (given.train_names, given.val_names))]
    images = (image.image for image in (*data.train, *data.val))
    paths += {image.folder for image in images if isinstance(image, Stored)}
    for path in paths:
        if not files.isdisjoint(_files(path)):
            raise UsageError(
                f"{printable(path)} is read, and is part of what --out {printable(options.out)} contains: "
                "name another --out"
            )


def _files(path: str) -> Iterator[str]:
    """The real path of the file at `path`, or those of the files of the dataset there."""
    yield os.path.realpath(path)
    if os.path.isdir(path) and is_dataset(path):
        with os.scandir(path) as entries:
            for entry in entries:
                yield os.path.realpath(entry.path)
                if entry.is_dir():
                    yield from (os.path.realpath(os.path.join(entry.path, name)) for name in os.listdir(entry.path))


@dataclass(frozen=True, eq=False)
class Shard:
    """Consecutive images of a split that are written to one file, except those that fail."""

    split: str
    number: int
    of: int
    images: Sequence[Annotated]
    listed: str  # SHA-256 of the images' names, addresses and captions

    @property
    def label(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> str:
        """The path relative to the copy's folder, named as `datasets` does."""
        return f"{self.split}/data-{self.number:05d}-of-{self.of:05d}.arrow"


@dataclass(frozen=True)
class ShardPlan:
    """All inputs that determine what is written.

    `source` is the data options as given. `odd_names`: some name is not UTF-8 and its bytes need a column. `tagged`:
    images may have tags.
    """

    settings: Mapping[str, Any]
    source: Mapping[str, Any]
    splits: Mapping[str, Sequence[Shard]]
    odd_names: bool
    tagged: bool = False

    @property
    def shards(self) -> list[Shard]:
        return [shard for shards in self.splits.values() for shard in shards]

    @property
    def count(self) -> int:
        """The number of images."""
        return sum(len(shard.images) for shard in self.shards)

    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json before any shard is written."""
        splits = {
            name: {
                "images": sum(len(shard.images) for shard in shards),
                "shards": [
                    {"file": shard.file, "images": len(shard.images), "listed": shard.listed} for shard in shards
                ],
            }
            for name, shards in self.splits.items()
        }
        return {
            "capcli": __version__,
            "state": "unfinished",
            "settings": dict(self.settings),
            "source": dict(self.source),
            "splits": splits,
        }

    def refuse_other(self, manifest: Mapping[str, Any], out: str) -> None:
        """Raises UsageError, with the difference, if the copy in `out` was started with another plan."""
        kind, lines = "settings", difference(manifest["settings"], self.settings)
        if not lines:
            kind, lines = "data", self._data_differences(manifest)
        if lines:
            raise UsageError(
                f"{printable(out)} was started with other {kind}: {'; '.join(lines)}. Use those, name another --out, "
                "or start from scratch with --overwrite"
            )

    def _data_differences(self, manifest: Mapping[str, Any]) -> list[str]:
        splits = manifest["splits"]
        lines = []
        for name in dict.fromkeys((*splits, *self.splits)):
            shards = self.splits.get(name, ())
            images = sum(len(shard.images) for shard in shards)
            before = splits.get(name, {"images": 0, "shards": []})
            if before["images"] != images:
                lines.append(f"{name} had {counted(before['images'], 'image')}, now {images}")
                continue
            for shard, old in zip(shards, before["shards"], strict=True):
                if shard.listed != old["listed"]:
                    first = shard.number * self.settings["shard_size"] + 1
                    last = first + len(shard.images) - 1
                    lines.append(f"images {first} to {last} of {name} have other names, paths or captions")
                    break
        return lines


def make_plan(options: PrepareOptions, splits: Mapping[str, Sequence[Annotated]]) -> ShardPlan:
    """Cuts the images of each split into shards; a split without images is left out."""
    quality = 95 if options.quality is None and options.format != "png" else options.quality
    settings = {
        "edge": options.edge,
        "format": options.format,
        "quality": quality,
        "shard_size": options.shard_size,
        "max_pixels": options.max_pixels,
        "url_column": options.url_column,
    }
    source = {name: value for name, value in asdict(options.data).items() if value not in (None, ())}
    urls = options.url_column is not None
    shards = {name: _cut(name, images, options.shard_size, urls=urls) for name, images in splits.items() if images}
    odd_names = not all(is_text(image.name) for images in splits.values() for image in images)
    return ShardPlan(settings, source, shards, odd_names, tagged=options.data.tags_column is not None)


def _cut(split: str, images: Sequence[Annotated], size: int, *, urls: bool) -> list[Shard]:
    parts = [images[start : start + size] for start in range(0, len(images), size)]
    return [Shard(split, number, len(parts), part, _digest(part, urls=urls)) for number, part in enumerate(parts)]


def _digest(images: Sequence[Annotated], *, urls: bool) -> str:
    digest = hashlib.sha256()
    for image in images:
        address = image.name if urls or image.image is None else address_of(_absolute(image.image))
        digest.update(json.dumps([image.name, address, image.captions, *([image.tags] if image.tags else ())]).encode())
    return digest.hexdigest()


def _absolute(image: str | Stored) -> str | Stored:
    """The image with an absolute path, which does not depend on the working folder."""
    return os.path.abspath(image) if isinstance(image, str) else replace(image, folder=os.path.abspath(image.folder))
