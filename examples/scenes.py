"""Draws endless small scenes with captions that say what is in them, and tells whether a caption is right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from scene import KINDS, Group, Scene, make_scene, place
from scene_drawing import PICTURE_SIZE, draw
from scene_words import captions, describe, judge, side_captions

__all__ = [
    "KINDS",
    "PICTURE_SIZE",
    "Group",
    "Scene",
    "captions",
    "describe",
    "draw",
    "judge",
    "make_scene",
    "place",
    "write_classes",
    "write_folder",
]


def write_folder(
    folder: Path, count: int, seed: int, suffixes: Sequence[str] = (".jpg",), *, sides: bool = False
) -> None:
    """Draws `count` scenes into the folder, with a `metadata.jsonl` beside them (Hugging Face's imagefolder).

    Its rows hold `file_name`, `text` (one caption) and `captions` (all of them). The suffixes take turns.
    `sides` draws one group of each scene only, on its side of the picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene-{index:04d}{suffixes[index % len(suffixes)]}" for index in range(count)]
    write = partial(write_side if sides else write_scene, folder, seed)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8", newline="\n") as rows, ProcessPoolExecutor() as workers:
        for name, texts in zip(names, workers.map(write, range(count), names, chunksize=100), strict=True):
            rows.write(json.dumps({"file_name": name, "text": texts[0], "captions": list(texts)}) + "\n")


def write_scene(folder: Path, seed: int, index: int, name: str) -> tuple[str, ...]:
    """Draws one scene into the folder; its captions."""
    scene = make_scene(seed, index)
    _save(draw(scene), folder / name)
    return captions(scene)


def write_side(folder: Path, seed: int, index: int, name: str) -> tuple[str, ...]:
    """Draws one side of a scene whose groups stand side by side into the folder; its captions."""
    scene = make_scene(seed, index, ("left",))
    drawn, without = (scene.first, scene.second) if index % 2 else (scene.second, scene.first)
    _save(draw(scene, without=without), folder / name)
    return side_captions(scene, drawn)


def write_classes(folder: Path, count: int, seed: int, suffixes: Sequence[str] = (".jpg",)) -> None:
    """Draws one group of each of `count` scenes into the folder of its kind: cat/scene-0001.jpg and the like."""
    scenes = [make_scene(seed, index, ("left",)) for index in range(count)]
    kinds = [(scene.first if index % 2 else scene.second).kind for index, scene in enumerate(scenes)]
    for kind in sorted(set(kinds)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    names = [f"{kind}/scene-{n:04d}{suffixes[n % len(suffixes)]}" for n, kind in enumerate(kinds)]
    with ProcessPoolExecutor() as workers:
        list(workers.map(partial(write_side, folder, seed), range(count), names, chunksize=100))


def _save(picture: Image.Image, path: Path) -> None:
    picture.save(path, **({} if path.suffix == ".png" else {"quality": 88}))


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw small scenes, with captions in metadata.jsonl.")
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--count", type=int, default=24, help="how many (24)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (0)")
    parser.add_argument("--format", choices=("jpg", "png", "webp", "mixed"), default="jpg", help="of the files (jpg)")
    parser.add_argument("--sides", action="store_true", help="draw one group only, on the left or on the right")
    parser.add_argument("--classes", action="store_true", help="draw one group only, into the folder of its kind")
    options = parser.parse_args()
    suffixes = (".jpg", ".png", ".webp") if options.format == "mixed" else (f".{options.format}",)
    if options.classes:
        write_classes(options.folder, options.count, options.seed, suffixes)
    else:
        write_folder(options.folder, options.count, options.seed, suffixes, sides=options.sides)


if __name__ == "__main__":
    main()
