"""How many captions of a captioner of drawn scenes are right, in each respect and in all; --card writes its model card.

    python examples/judge_demo.py build/demo/captioner

The scenes have a seed that is used for nothing else, and are read from image files. Captions are greedy, from transformers
alone, or from capcli for architectures that transformers does not have. `demo-model/README.md` is written by this script.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import scenes
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from capcli import Captioner

SUFFIXES = (".jpg", ".png", ".webp")
JUDGED_SEED, PICTURES_SEED = 3, 4  # demo.toml uses 1, 2 and 5


@dataclass(slots=True)
class Tally:
    """How many captions are right in each respect; `right`: in all of them, and in the weather where it is mentioned.

    `ended` counts captions with an end token, where that is known.
    """

    scenes: int = 0
    object: int = 0
    colour: int = 0
    count: int = 0
    relation: int = 0
    right: int = 0
    ended: int = 0

    def add(self, caption: str, scene: scenes.Scene, *, ended: bool) -> None:
        verdict = scenes.judge(caption, scene)
        self.scenes += 1
        self.object += verdict.object
        self.colour += verdict.colour
        self.count += verdict.count
        self.relation += verdict.relation
        self.right += verdict.right
        self.ended += ended

    def shares(self) -> dict[str, str]:
        counts = {
            name: value for name, value in asdict(self).items() if name != "scenes" and (value or name != "ended")
        }
        return {name: f"{value / self.scenes:.1%}" for name, value in counts.items()}


def judge(folder: Path, seed: int, count: int) -> Tally:
    """Caption `count` new scenes and judge the captions."""
    plain = AutoConfig.from_pretrained(folder).model_type == VisionEncoderDecoderConfig.model_type
    tally = Tally()
    with tempfile.TemporaryDirectory() as pictures:
        scenes.write_folder(Path(pictures), count, seed, SUFFIXES)
        paths = sorted(Path(pictures, name) for name in os.listdir(pictures) if name != "metadata.jsonl")
        for index, (text, ended) in enumerate(by_transformers(folder, paths) if plain else by_capcli(folder, paths)):
            tally.add(text, scenes.make_scene(seed, index), ended=ended)
    return tally


@torch.inference_mode()
def by_transformers(folder: Path, paths: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    """The caption of each picture, one at a time, and whether it has an end token."""
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    for path in paths:
        with Image.open(path) as picture:
            ids = model.generate(**processor(picture.convert("RGB"), return_tensors="pt"))[0]
        yield tokenizer.decode(ids, skip_special_tokens=True), tokenizer.eos_token_id in ids


def by_capcli(folder: Path, paths: Sequence[Path]) -> Iterator[tuple[str, bool]]:
    captioner = Captioner.load(str(folder), device="cpu", dtype="float32")
    for result in captioner.caption(paths, num_beams=1, do_sample=False):
        yield getattr(result, "text", ""), False


CARD = """---
library_name: transformers
pipeline_tag: image-to-text
---

# Demo captioner

A small image captioner for drawn scenes: a ViT encoder ({encoder.num_hidden_layers} layers, {encoder.image_size} x
{encoder.image_size} pixels in patches of {encoder.patch_size}) and a GPT-2 decoder ({decoder.n_layer} layers), both
{decoder.n_embd} wide, with a byte-level BPE of its own. `capcli train` trained it from
random weights, on one CPU thread, with the recipe `examples/demo.toml`, on pictures that
`examples/scenes.py` draws:
{kinds} and {last_kind}, in eight colours, one to
four of each, in five kinds of weather; it cannot caption photographs.

Greedy captions of scenes of a held-out seed, read from their files and judged by
`scenes.judge`, which counts a caption as right only when every part of it is:

| | {scenes:,} held-out scenes |
| --- | --- |
| objects right | {object} |
| colours right | {colour} |
| counts right | {count} |
| relation right | {relation} |
| **all right, and the weather where it is mentioned** | **{right}** |
| ended by an end token | {ended} |

Of the {pictures.scenes} pictures in `examples/scenes/`, {pictures.right} are captioned right.
"""


def card(folder: Path, held_out: Tally, pictures: Tally) -> str:
    config = VisionEncoderDecoderConfig.from_pretrained(folder)
    *kinds, last_kind = (kind.many for kind in scenes.KINDS.values())
    return CARD.format(
        encoder=config.encoder,
        decoder=config.decoder,
        kinds=", ".join(kinds),
        last_kind=last_kind,
        scenes=held_out.scenes,
        pictures=pictures,
        **held_out.shares(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a captioner of drawn scenes.")
    parser.add_argument("folder", type=Path, help="the captioner")
    parser.add_argument("--count", type=int, default=1000, help="held-out scenes (1000)")
    parser.add_argument("--card", action="store_true", help="write its README.md with the figures")
    options = parser.parse_args()
    held_out = judge(options.folder, JUDGED_SEED, options.count)
    pictures = judge(options.folder, PICTURES_SEED, 24)
    print("  ".join(f"{name} {share}" for name, share in held_out.shares().items()), f" of {held_out.scenes} scenes;")
    print(f"of the {pictures.scenes} pictures of examples/scenes {pictures.right} are right")
    if options.card:
        text = card(options.folder, held_out, pictures)
        (options.folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
