"""Whether training waits for its images: how fast they load, how fast a step is without them, and how fast both are together.

    python examples/measure_training.py --data captions.txt --model-size base --batch-size 8

Three rates in images/s, in turns, for the photos as they are and for a copy that `capcli prepare` makes: the Trainer's own
loader by itself; the Trainer on synthetic batches of the same shapes, which is the ceiling; and the Trainer on its loader.
Models have random weights: ViT-B/16 at 224 and GPT-2 small, or the small one of flickr8k-small.toml. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, cycle, islice, repeat
from typing import Any

import torch
from transformers import TrainerCallback

from capcli.annotations import read_split
from capcli.options import DataOptions, GenerationOptions, ModelOptions, PrepareOptions, TrainOptions
from capcli.prepare import run
from capcli.training.data.dataset import TrainingData
from capcli.training.loop.arguments import training_arguments
from capcli.training.model.assembly import AssembledCaptioner, assemble
from capcli.training.model.embeddings import extend_embeddings
from capcli.training.setup import make_trainer

Batch = dict[str, Any]
SIZES: dict[str, dict[str, Any]] = {
    "base": {"edge": 256, "vocabulary": 50257, "encoder": {}, "decoder": {}},
    "small": {
        "edge": 96,
        "vocabulary": 4000,
        "encoder": {
            "image_size": 96,
            "patch_size": 16,
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "intermediate_size": 768,
        },
        "decoder": {"n_embd": 192, "n_layer": 3, "n_head": 6},
    },
}
UNTIMED = 3  # steps or batches at the beginning of each measurement
SHAPES = 32  # batches whose shapes synthetic ones take
FOR_EVER = 10**9  # steps: the clock ends each measurement


class Feed:
    """Batches for the Trainer, without end, that counts the images in them."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self.batches, self.images = batches, 0

    def __len__(self) -> int:
        return FOR_EVER

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.images += len(batch["labels"])
            yield batch


class Clock(TrainerCallback):
    """Ends a training after `seconds`, from the first timed step on, and says how many images/s it learnt from."""

    def __init__(self, feed: Feed, seconds: float) -> None:
        self.feed, self.seconds = feed, seconds
        self.steps = self.images = 0
        self.began = self.rate = 0.0

    def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> Any:
        self.steps += 1
        if self.steps == UNTIMED:
            self.began, self.images = now(), self.feed.images
        elif self.steps > UNTIMED and time.perf_counter() - self.began >= self.seconds:
            self.rate = (self.feed.images - self.images) / (now() - self.began)
            control.should_training_stop = True
        return control


def now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def train(trainer: Any, batches: Iterable[Batch], seconds: float) -> float:
    """Images/s of the Trainer on these batches."""
    feed = Feed(batches)
    clock = Clock(feed, seconds)
    trainer.get_train_dataloader = lambda: feed
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.rate


def load(batches: Iterable[Batch], seconds: float) -> float:
    """Images/s when nothing is done with the batches."""
    images, began = 0, None
    for number, batch in enumerate(batches, 1):
        if began is None:
            began = now() if number == UNTIMED else None
            continue
        images += len(batch["labels"])
        if time.perf_counter() - began >= seconds:
            return images / (now() - began)
    raise AssertionError("a loader that begins again does not end")


def without_end(loader: Iterable[Batch]) -> Iterator[Batch]:
    """A loader's batches, epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def synthetic(loader: Iterable[Batch]) -> list[Batch]:
    """Batches on the device with the shapes of some that the loader gives."""
    made = []
    for batch in islice(without_end(loader), SHAPES):
        pixels = torch.randint_like(batch["pixel_values"], 256)
        tokens = {name: torch.randint_like(batch[name], 3, 250) for name in ("decoder_input_ids", "labels")}
        made.append({"pixel_values": pixels, **tokens})
    return made


def captioner(options: TrainOptions, data: TrainingData, vocabulary: int) -> AssembledCaptioner:
    """Random weights, with as many embeddings as a captioner of this size has."""
    captions = [text for each in data.train for text in each.captions]
    made = assemble(options.model, lambda: captions, options.generation, 0)
    extend_embeddings(made.model.decoder, vocabulary, 0)
    return made


def sides(arguments: argparse.Namespace, folder: str) -> dict[str, Callable[[], float]]:
    """What is measured, by name."""
    size = SIZES[arguments.model_size]
    asked = DataOptions((arguments.data,), image_root=arguments.image_root, train_limit=arguments.images)
    run.run(PrepareOptions(asked, f"{folder}/prepared", edge=size["edge"], quiet=True))
    model = ModelOptions(
        encoder={"model_type": "vit", **size["encoder"]},
        decoder={"model_type": "gpt2", **size["decoder"]},
        tokenizer="new",
        vocab_size=size["vocabulary"],
    )
    places = {"original": asked, "prepared": DataOptions((f"{folder}/prepared",))}
    made: AssembledCaptioner | None = None
    trainers = {}
    for name, place in places.items():
        options = TrainOptions(
            place,
            model,
            f"{folder}/out",
            GenerationOptions(),
            max_steps=FOR_EVER,
            batch_size=arguments.batch_size,
            learning_rate=1e-5,
            workers=arguments.workers,
            device=arguments.device,
        )
        split = read_split(place)
        data = TrainingData(split.train, [], split.report)
        made = made or captioner(options, data, size["vocabulary"])
        trainers[name] = make_trainer(options, training_arguments(options, options.out), made, data)
    trainer = trainers["prepared"]  # one of them trains, so that there is one optimizer
    loaders = {name: each.get_train_dataloader() for name, each in trainers.items()}
    batches = synthetic(loaders["prepared"])
    train(trainer, cycle(batches), 0.0)  # kernels are chosen, and the GPU's memory is taken
    found: dict[str, Callable[[], float]] = {"step": lambda: train(trainer, cycle(batches), arguments.seconds)}
    for name, loader in loaders.items():
        found[f"{name} loader"] = lambda loader=loader: load(without_end(loader), arguments.seconds)
        found[f"{name} both"] = lambda loader=loader: train(trainer, without_end(loader), arguments.seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="images with captions, as capcli train takes them")
    parser.add_argument("--image-root", help="where the images are")
    parser.add_argument("--images", type=int, default=2000, help="of the data, at most")
    parser.add_argument("--model-size", choices=SIZES, default="base")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, help="processes that load images; as capcli train chooses if not given")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = sides(arguments, folder)
        rounds = [{name: measure() for name, measure in measured.items()} for _ in range(arguments.rounds)]
    show(rounds, arguments)


def show(rounds: list[dict[str, float]], arguments: argparse.Namespace) -> None:
    """Medians over the rounds, the ceiling first; a share is of the slower of step and loader in the same round."""
    rates = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    shares = {
        name: statistics.median(each[f"{name} both"] / min(each["step"], each[f"{name} loader"]) for each in rounds)
        for name in ("original", "prepared")
    }
    print(f"{'step alone (ceiling)':24}{rates['step']:10.2f} images/s")
    for name, share in shares.items():
        print(f"{name + ', loader alone':24}{rates[name + ' loader']:10.2f}")
        print(f"{name + ', both':24}{rates[name + ' both']:10.2f}   {share:.1%} of the slower one")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and arguments.device == "auto" else "cpu"
    settings = {"model_size": arguments.model_size, "batch_size": arguments.batch_size, "threads": arguments.threads}
    figures = {name.replace(" ", "_"): round(rate, 2) for name, rate in rates.items()}
    figures |= {f"{name}_share": round(share, 3) for name, share in shares.items()}
    print(json.dumps({"device": where, **settings, **figures}))


if __name__ == "__main__":
    main()
