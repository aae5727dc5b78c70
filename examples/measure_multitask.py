"""Measures one captioner of drawn scenes at three tasks: captions, classes, and captions with gaps.

    python examples/measure_multitask.py build/multitask

Scenes are of seeds that were used for nothing else, read from picture files. A caption is right as `scenes.judge` has it, a label
when it is the label to the letter (of twelve), a gap when exactly its words come back; beside it, how many do when the picture
is another scene's: what can be guessed from the words alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import scenes

from capcli import Captioner
from capcli.records import Caption
from capcli.training.data.masking import choose
from capcli.training.loop.task_validation import restored

SCENES_SEED, CLASSES_SEED = 3, 8
QUESTION = "What is in the image?"


def answers(captioner: Captioner, pictures: list[Path], prompt: str | None = None) -> list[str]:
    said = captioner.caption(pictures, prompt=prompt, num_beams=1)
    return [result.text if isinstance(result, Caption) else "" for result in said]


def captions_right(captioner: Captioner, folder: Path, count: int) -> list[bool]:
    said = answers(captioner, [folder / f"scene-{n:04d}.jpg" for n in range(count)])
    return [scenes.judge(text, scenes.make_scene(SCENES_SEED, n)).right for n, text in enumerate(said)]


def classes_right(captioner: Captioner, folder: Path) -> list[bool]:
    pictures = sorted(folder.glob("*/*.jpg"))
    said = answers(captioner, pictures, QUESTION)
    return [text == f"a photo of {path.parent.name}" for path, text in zip(pictures, said, strict=True)]


def gaps_restored(captioner: Captioner, folder: Path, count: int, away: int) -> list[bool]:
    """Of scenes' first captions, gap by gap; the picture is that of the scene `away` from it."""
    right: list[bool] = []
    for n in range(count):
        words = scenes.captions(scenes.make_scene(SCENES_SEED, n))[0].split()
        gone = choose(len(words), np.random.default_rng(n), 99)
        text, answer, number = "", "", 0
        for at, word in enumerate(words):
            if gone[at] and not (at and gone[at - 1]):
                text += f"<extra_id_{number}>"
                answer += f" <extra_id_{number}>"
                number += 1
            if gone[at]:
                answer += f" {word}"
            else:
                text += f" {word}"
        [said] = answers(captioner, [folder / f"scene-{(n + away) % count:04d}.jpg"], text.strip())
        right += restored(said, answer)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a captioner of drawn scenes at several tasks.")
    parser.add_argument("folder", help="the captioner")
    parser.add_argument(
        "--count", type=int, default=1000, help="scenes to caption (1000); half as many for each other task"
    )
    options = parser.parse_args()
    captioner, half = Captioner.load(options.folder, dtype="float32"), options.count // 2
    with tempfile.TemporaryDirectory() as pictures:
        drawn, classes = Path(pictures, "scenes"), Path(pictures, "classes")
        scenes.write_folder(drawn, options.count, SCENES_SEED)
        scenes.write_classes(classes, half, CLASSES_SEED)
        for name, right in (
            ("captions right", captions_right(captioner, drawn, options.count)),
            ("labels right", classes_right(captioner, classes)),
            ("gaps restored", gaps_restored(captioner, drawn, half, 0)),
            ("gaps restored before another picture", gaps_restored(captioner, drawn, half, 1)),
        ):
            print(f"{name}: {sum(right) / len(right):.1%} of {len(right):,}")


if __name__ == "__main__":
    main()
