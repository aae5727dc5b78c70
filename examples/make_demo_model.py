"""Makes `demo-model/`: trains a tokenizer and a small captioner on drawn scenes, from scratch, and measures them."""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scenes
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

HERE = Path(__file__).parent
IMAGE_SIZE, PATCH_SIZE = 96, 12
PATCHES = IMAGE_SIZE // PATCH_SIZE
WIDTH, HEADS, ENCODER_LAYERS, DECODER_LAYERS = 160, 5, 5, 2
VOCABULARY, LONGEST, CAPTIONS = 448, 32, 5
IGNORED = -100  # a label that is left out of the loss
SUFFIXES = (".jpg", ".png", ".webp")
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

# No two of these share a scene: the seed is part of every scene's key.
TRAINING_SEED, CHECKING_SEED, MEASURING_SEED, PICTURES_SEED = 1, 2, 3, 4

KIND_NAMES, COLOUR_NAMES, WEATHER_NAMES = list(scenes.KINDS), list(scenes.COLOURS), list(scenes.WEATHER_WORDS)
RELATION_NAMES = list(scenes.RELATION_WORDS)
GROUP_SIZES = (len(KIND_NAMES), len(COLOUR_NAMES), scenes.MOST_OF_A_KIND)
FACT_SIZES = (*GROUP_SIZES, *GROUP_SIZES, len(RELATION_NAMES), len(WEATHER_NAMES))
PATCH_SIZES = (len(KIND_NAMES) + 1, len(COLOUR_NAMES) + 1, 3)


# The captioner before training


def make_tokenizer(count: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the captions of the first training scenes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for index in range(count) for text in scenes.captions(scenes.make_scene(TRAINING_SEED, index)))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=LONGEST,
        clean_up_tokenization_spaces=False,
    )


def make_image_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=Image.Resampling.BILINEAR,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> VisionEncoderDecoderModel:
    encoder = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=ENCODER_LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
    )
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    decoder = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=2 * LONGEST,
        n_embd=WIDTH,
        n_layer=DECODER_LAYERS,
        n_head=HEADS,
        add_cross_attention=True,
        is_decoder=True,
        embd_pdrop=0.0,  # scenes are endless, so nothing can be learnt by heart
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        **ids,
    )
    start = {"decoder_start_token_id": tokenizer.bos_token_id}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder, **ids, **start)
    model = VisionEncoderDecoderModel(config)
    model.generation_config = GenerationConfig(**ids, **start, max_new_tokens=LONGEST, num_beams=1, do_sample=False)
    return model


# What it learns from


@dataclass(frozen=True, slots=True)
class Lessons:
    """Scenes drawn in advance, as the image processor would leave them, with their captions and their truth."""

    pixels: npt.NDArray[np.uint8]  # [N, IMAGE_SIZE, IMAGE_SIZE, 3]
    tokens: npt.NDArray[np.int64]  # [N, captions, LONGEST], IGNORED after the end token
    facts: npt.NDArray[np.int64]  # [N, len(FACT_SIZES)]
    patches: npt.NDArray[np.int64]  # [N, PATCHES * PATCHES, len(PATCH_SIZES)]


def draw_lessons(tokenizer: PreTrainedTokenizerFast, count: int, keep: Path | None) -> Lessons:
    """The first `count` training scenes; the pixels are taken from the `keep` folder where an earlier run left them."""
    made = [scenes.make_scene(TRAINING_SEED, index) for index in range(count)]
    kept = keep / "pixels.npy" if keep else None
    if kept and kept.exists():
        pixels = np.load(kept, mmap_mode="r")[:count]
    else:
        with ProcessPoolExecutor() as workers:
            pixels = np.stack(list(workers.map(draw_pixels, made, chunksize=200)))
        if kept:
            np.save(kept, pixels)
    return Lessons(
        pixels,
        np.stack([list_tokens(tokenizer, scene) for scene in made]),
        np.array([list_facts(scene) for scene in made]),
        np.stack([list_patches(scene) for scene in made]),
    )


def draw_pixels(scene: scenes.Scene) -> npt.NDArray[np.uint8]:
    """The scene at the model's size, by the processor's own resizing, half of them through a JPEG file first."""
    picture = scenes.draw(scene)
    rng = random.Random(f"{scene.key} file")
    if rng.random() < 0.5:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=rng.randint(70, 95))
        picture = Image.open(file)
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def list_tokens(tokenizer: PreTrainedTokenizerFast, scene: scenes.Scene) -> npt.NDArray[np.int64]:
    tokens = np.full((CAPTIONS, LONGEST), IGNORED, np.int64)
    for row, ids in zip(tokens, tokenizer(list(scenes.captions(scene, CAPTIONS)))["input_ids"], strict=True):
        row[: len(ids) + 1] = [*ids, tokenizer.eos_token_id]
    return tokens


def list_facts(scene: scenes.Scene) -> list[int]:
    facts = []
    for group in (scene.first, scene.second):
        facts += [KIND_NAMES.index(group.kind), COLOUR_NAMES.index(group.colour), group.count - 1]
    return [*facts, RELATION_NAMES.index(scene.relation), WEATHER_NAMES.index(scene.weather)]


def list_patches(scene: scenes.Scene) -> npt.NDArray[np.int64]:
    """For each patch the kind and colour of the thing at its middle (0: none) and how many things have theirs in it."""
    patches = np.zeros((PATCHES, PATCHES, len(PATCH_SIZES)), np.int64)
    middles = (np.arange(PATCHES) + 0.5) / PATCHES
    for thing in scenes.place(scene):  # those in front come last and hide those behind
        left, top, right, bottom = thing.frame
        within = np.outer((middles >= top) & (middles <= bottom), (middles >= left) & (middles <= right))
        patches[within, :2] = KIND_NAMES.index(thing.kind) + 1, COLOUR_NAMES.index(thing.colour) + 1
        row, column = int((top + bottom) / 2 * PATCHES), int((left + right) / 2 * PATCHES)
        patches[row, column, 2] = min(patches[row, column, 2] + 1, 2)
    return patches.reshape(-1, len(PATCH_SIZES))


# Training


class Tutor(torch.nn.Module):
    """Asks the encoder what is where and what the scene is, which teaches it far sooner than captions alone.

    It is thrown away at the end: the captioner is the plain model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scene = torch.nn.Linear(WIDTH, sum(FACT_SIZES))
        self.patch = torch.nn.Linear(WIDTH, sum(PATCH_SIZES))

    def forward(self, seen: torch.Tensor, facts: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The mean loss of all questions; `seen` is [B, 1 + patches, WIDTH]."""
        whole = _ask(self.scene(seen[:, 0]), facts, FACT_SIZES)
        return whole + _ask(self.patch(seen[:, 1:]).flatten(0, 1), patches.flatten(0, 1), PATCH_SIZES)


def _ask(logits: torch.Tensor, truth: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    parts = zip(logits.split(sizes, dim=-1), truth.unbind(-1), strict=True)
    return torch.stack([F.cross_entropy(part, answer) for part, answer in parts]).mean()


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train and how fast to learn."""

    steps: int
    batch: int = 64
    peak_rate: float = 1e-3
    warm_up: int = 400
    tutoring: float = 1.0
    report_every: int = 50
    check_every: int = 500

    def rate_at(self, step: int) -> float:
        if step < self.warm_up:
            return self.peak_rate * step / self.warm_up
        return self.peak_rate * (1 + math.cos(math.pi * (step - self.warm_up) / (self.steps - self.warm_up))) / 2


def train(
    model: VisionEncoderDecoderModel, lessons: Lessons, plan: Plan, keep: Path | None, check: Callable[[], object]
) -> None:
    """Cross-entropy on captions (end token always, padding never) plus the tutor's; the rate warms up and anneals."""
    tutor = Tutor()
    learners = torch.nn.ModuleList([model, tutor])
    optimizer = _make_optimizer(learners)
    held = {"model": model, "tutor": tutor, "optimizer": optimizer}
    first = _restore(held, keep)
    progress = Progress(plan, first)
    model.train()
    for step, chosen in enumerate(_batches(len(lessons.pixels), plan), start=1):
        if step <= first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = plan.rate_at(step)
        said, asked = _losses(model, tutor, lessons, chosen, step)
        (said + plan.tutoring * asked).backward()
        torch.nn.utils.clip_grad_norm_(learners.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.add(step, said.item(), asked.item())
        if step % plan.check_every == 0:
            _save(held, step, keep)
            print(f"step {step}: {check()}", flush=True)


class Progress:
    """Prints the mean losses and the pace every so often."""

    def __init__(self, plan: Plan, first: int) -> None:
        self.plan, self.first, self.started = plan, first, time.monotonic()
        self.losses: list[tuple[float, float]] = []

    def add(self, step: int, said: float, asked: float) -> None:
        self.losses.append((said, asked))
        if step % self.plan.report_every:
            return
        captions, tutor = np.mean(self.losses, axis=0)
        pace = (step - self.first) * self.plan.batch / (time.monotonic() - self.started)
        losses = f"captions {captions:.3f}  tutor {tutor:.3f}"
        print(f"step {step}/{self.plan.steps}  {losses}  {pace:.0f} images/s", flush=True)
        self.losses.clear()


def _make_optimizer(learners: torch.nn.Module) -> torch.optim.AdamW:
    """Only matrices decay: biases and norms have no scale to hold down."""
    weights = list(learners.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": 0.05},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def _losses(
    model: VisionEncoderDecoderModel, tutor: Tutor, lessons: Lessons, chosen: npt.NDArray[np.int64], step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = as_input(lessons.pixels[chosen])
    wording = np.random.default_rng(step).integers(CAPTIONS, size=len(chosen))
    labels = torch.from_numpy(lessons.tokens[chosen, wording])
    labels = labels[:, : int((labels != IGNORED).sum(1).max())]
    seen = model.encoder(pixel_values=pixels)
    said = model(encoder_outputs=seen, labels=labels).loss
    facts, patches = torch.from_numpy(lessons.facts[chosen]), torch.from_numpy(lessons.patches[chosen])
    return said, tutor(seen.last_hidden_state, facts, patches)


def as_input(pixels: npt.NDArray[np.uint8]) -> torch.Tensor:
    """[N, 3, IMAGE_SIZE, IMAGE_SIZE] from -1 to 1, as the image processor has it."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _batches(count: int, plan: Plan) -> Iterator[npt.NDArray[np.int64]]:
    """Every scene once, then every scene again in another order, until the steps are done."""
    per_round = count // plan.batch
    for step in range(plan.steps):
        turn, place = divmod(step, per_round)
        if place == 0:
            order = np.random.default_rng(turn).permutation(count)
        yield np.sort(order[place * plan.batch : (place + 1) * plan.batch])


def _save(held: dict[str, Any], step: int, keep: Path | None) -> None:
    if keep:
        state = {name: part.state_dict() for name, part in held.items()} | {"step": step}
        torch.save(state, keep / "training.pt.new")
        os.replace(keep / "training.pt.new", keep / "training.pt")


def _restore(held: dict[str, Any], keep: Path | None) -> int:
    """The step to go on after: 0 unless an interrupted run left its state."""
    if not keep or not (keep / "training.pt").exists():
        return 0
    state = torch.load(keep / "training.pt", weights_only=True)
    for name, part in held.items():
        part.load_state_dict(state[name])
    return int(state["step"])


# Measuring


@dataclass(slots=True)
class Tally:
    """How many captions are right in each respect; `right` is all of them at once, and a true word on the weather."""

    scenes: int = 0
    object: int = 0
    colour: int = 0
    count: int = 0
    relation: int = 0
    right: int = 0
    ended: int = 0

    def add(self, caption: str, scene: scenes.Scene, ended: bool) -> None:
        verdict = scenes.judge(caption, scene)
        self.scenes += 1
        self.object += verdict.object
        self.colour += verdict.colour
        self.count += verdict.count
        self.relation += verdict.relation
        self.right += verdict.right
        self.ended += ended

    def __str__(self) -> str:
        shares = {name: value / self.scenes for name, value in asdict(self).items() if name != "scenes"}
        return "  ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f"  of {self.scenes} scenes"


def check(model: VisionEncoderDecoderModel, tokenizer: PreTrainedTokenizerFast, count: int = 200) -> Tally:
    """A quick look while training, at scenes of another seed."""
    made = [scenes.make_scene(CHECKING_SEED, index) for index in range(count)]
    model.eval()
    with torch.inference_mode():
        ids = model.generate(as_input(np.stack([draw_pixels(scene) for scene in made])))
    model.train()
    tally = Tally()
    for scene, row, text in zip(made, ids, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
        tally.add(text, scene, tokenizer.eos_token_id in row)
    return tally


def measure(folder: Path, seed: int, count: int) -> Tally:
    """As a user would: picture files, and the captioner as plain transformers load it from its folder."""
    model = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    tally = Tally()
    with tempfile.TemporaryDirectory() as pictures:
        scenes.write_folder(Path(pictures), count, seed, SUFFIXES)
        for index, name in enumerate(sorted(name for name in os.listdir(pictures) if name != "metadata.jsonl")):
            with Image.open(Path(pictures, name)) as picture, torch.inference_mode():
                ids = model.generate(**processor(picture.convert("RGB"), return_tensors="pt"))[0]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            tally.add(text, scenes.make_scene(seed, index), tokenizer.eos_token_id in ids)
    return tally


CARD = """---
library_name: transformers
pipeline_tag: image-to-text
---

# Demo captioner

A small image captioner for drawn scenes: a ViT encoder ({encoder_layers} layers, {size} x {size} pixels in patches of
{patch}) and a GPT-2 decoder ({decoder_layers} layers), both {width} wide, with a byte-level BPE of its own.
`examples/make_demo_model.py` trained it from scratch, on CPU, on pictures that `examples/scenes.py` draws. It knows
{kinds} and {last_kind}, in eight colours, one to
four of each, in five kinds of weather; of photographs it knows nothing.

Greedy captions of scenes of a seed that was used for nothing else, read from their files and judged by
`scenes.judge`, which counts a caption as right only when every part of it is:

| | {scenes:,} held-out scenes |
| --- | --- |
| objects right | {object} |
| colours right | {colour} |
| counts right | {count} |
| relation right | {relation} |
| **all right, and the weather where it is mentioned** | **{right}** |
| ended by an end token | {ended} |

Of the {picture_count} pictures in `examples/scenes/`, {pictures_right} are captioned right.

While it learnt, linear heads asked its encoder what is where and what the scene is; they are not part of the model.
"""


def write_card(held_out: Tally, pictures: Tally) -> str:
    shares = {name: f"{value / held_out.scenes:.1%}" for name, value in asdict(held_out).items() if name != "scenes"}
    *kinds, last_kind = (kind.many for kind in scenes.KINDS.values())
    return CARD.format(
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS,
        size=IMAGE_SIZE,
        patch=PATCH_SIZE,
        width=WIDTH,
        kinds=", ".join(kinds),
        last_kind=last_kind,
        scenes=held_out.scenes,
        picture_count=pictures.scenes,
        pictures_right=pictures.right,
        **shares,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo captioner, draw its pictures and measure it.")
    parser.add_argument("--scenes", type=int, default=100_000, help="training scenes to draw (100000)")
    parser.add_argument("--steps", type=int, default=9_000, help="training steps of 64 pictures (9000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--keep", type=Path, help="a folder for drawn scenes and training state, to go on from later")
    parser.add_argument(
        "--measure-only", action="store_true", help="measure the model that is there, and write its card"
    )
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="measure another captioner of scenes, and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(f"held out: {measure(options.measure, MEASURING_SEED, 1000)}")
        return
    folder = HERE / "demo-model"
    if not options.measure_only:
        make(folder, options.scenes, options.steps, options.keep)
    held_out, pictures = measure(folder, MEASURING_SEED, 1000), measure(folder, PICTURES_SEED, 24)
    print(f"held out: {held_out}\npictures: {pictures}")
    (folder / "README.md").write_text(write_card(held_out, pictures), encoding="utf-8")


def make(folder: Path, count: int, steps: int, keep: Path | None) -> None:
    torch.manual_seed(TRAINING_SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters", flush=True)
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    lessons = draw_lessons(tokenizer, count, keep)
    print(f"{count:,} scenes drawn", flush=True)
    train(model, lessons, Plan(steps), keep, lambda: check(model, tokenizer))
    for part in (model, tokenizer, make_image_processor()):
        part.save_pretrained(folder)
    scenes.write_folder(HERE / "scenes", 24, PICTURES_SEED, SUFFIXES)


if __name__ == "__main__":
    main()
