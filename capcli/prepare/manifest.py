"""What a copy is going to hold: settings, and the images of each shard; the same again for the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from capcli import __version__
from capcli.errors import UsageError
from capcli.options import PrepareOptions
from capcli.prepare.encoding import address_of
from capcli.records import Annotated
from capcli.storage.run_file import difference
from capcli.text import counted, is_text, printable


@dataclass(frozen=True, eq=False)
class Shard:
    """A fixed cut of a split: images that are written to one file, but those that fail."""

    split: str
    number: int
    of: int
    images: Sequence[Annotated]
    listed: str  # sha256 of the images' names, addresses and captions

    @property
    def label(self) -> str:
        return f"{self.split}-{self.number:05d}"

    @property
    def file(self) -> str:
        """As `datasets` names it, relative to the copy's folder."""
        return f"{self.split}/data-{self.number:05d}-of-{self.of:05d}.arrow"


@dataclass(frozen=True)
class ShardPlan:
    """All that decides what is written; `odd_names` where some name is not UTF-8, so that its bytes want a column,
    `tagged` where images may have tags.
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
        return sum(len(shard.images) for shard in self.shards)

    def manifest(self) -> dict[str, Any]:
        """What is written down before anything else is."""
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
        """Raises UsageError, naming the difference, when what is in `out` was begun from another plan."""
        lines = difference(manifest["settings"], self.settings)
        kind = "settings"
        if not lines:
            kind, lines = "data", self._other_data(manifest)
        if lines:
            raise UsageError(
                f"{printable(out)} was begun with other {kind}: {'; '.join(lines)}. Go on with those, name another --out, "
                "or start anew with --overwrite"
            )

    def _other_data(self, manifest: Mapping[str, Any]) -> list[str]:
        there = manifest["splits"]
        lines = []
        for name in dict.fromkeys((*there, *self.splits)):
            shards = self.splits.get(name, ())
            images = sum(len(shard.images) for shard in shards)
            before = there.get(name, {"images": 0, "shards": []})
            if before["images"] != images:
                lines.append(f"{name} had {counted(before['images'], 'image')}, now {images}")
                continue
            for shard, old in zip(shards, before["shards"], strict=True):
                if shard.listed != old["listed"]:
                    first = shard.number * self.settings["shard_size"] + 1
                    last = first + len(shard.images) - 1
                    lines.append(f"of {name}, images {first} to {last} are others, elsewhere, or captioned otherwise")
                    break
        return lines


def make_plan(options: PrepareOptions, splits: Mapping[str, Sequence[Annotated]]) -> ShardPlan:
    """Cut the images of each split into shards; a split without images is left out."""
    quality = 95 if options.quality is None and options.format != "png" else options.quality
    settings = {
        "edge": options.edge,
        "format": options.format,
        "quality": quality,
        "shard_size": options.shard_size,
        "max_pixels": options.max_pixels,
        "url_column": options.url_column,
    }
    asked = {name: value for name, value in asdict(options.data).items() if value not in (None, ())}
    addresses = options.url_column is not None
    cut = {
        name: _cut(name, images, options.shard_size, addresses=addresses) for name, images in splits.items() if images
    }
    odd_names = not all(is_text(image.name) for images in splits.values() for image in images)
    return ShardPlan(settings, asked, cut, odd_names, tagged=options.data.tags_column is not None)


def _cut(split: str, images: Sequence[Annotated], size: int, *, addresses: bool) -> list[Shard]:
    starts = range(0, len(images), size)
    pieces = [images[start : start + size] for start in starts]
    return [
        Shard(split, number, len(starts), piece, _listed(piece, addresses=addresses))
        for number, piece in enumerate(pieces)
    ]


def _listed(images: Sequence[Annotated], *, addresses: bool) -> str:
    digest = hashlib.sha256()
    for image in images:
        where = image.name if addresses or image.image is None else address_of(image.image)
        digest.update(json.dumps([image.name, where, image.captions, *([image.tags] if image.tags else ())]).encode())
    return digest.hexdigest()
