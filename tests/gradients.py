"""The gradients of one update on eight captions, split into batches and processes in different ways."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from assembling import GPT2, VIT, new, save_bytes, save_decoder
from captioners import pictures
from PIL import Image
from transformers import TrainerCallback

from capcli.annotations import DataReport
from capcli.interrupts import Interrupts
from capcli.options import DataOptions, ModelOptions, TrainOptions
from capcli.records import Annotated
from capcli.training.data.dataset import TrainingData
from capcli.training.loop.arguments import training_arguments
from capcli.training.loop.callbacks import ScheduleCallback
from capcli.training.loop.freezing import freeze
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.setup import make_trainer

CAPTIONS = [
    ("a dog", "two dogs are running on the sand by the water and one of them jumps"),
    ("a man in a red shirt", "bike"),
    ("a child plays with a ball in the park", "children"),
    ("the brown dog catches a ball in its mouth", "a girl in a blue dress jumps over the puddle"),
]


def annotated(folder: Path) -> list[Annotated]:
    """Four images with two captions each, on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures(len(CAPTIONS))):
        Image.fromarray(picture).save(folder / f"{number}.png")
    return [Annotated(f"{n}.png", str(folder / f"{n}.png"), captions) for n, captions in enumerate(CAPTIONS)]


def captioner(folder: Path) -> AssembledCaptioner:
    """A captioner without dropout; its tokenizer has one special token for start, end and padding."""
    if not (folder / "vocab.json").exists():
        save_decoder(folder, vocabulary=300)
        save_bytes(folder)
    assembled = new(decoder=str(folder), tokenizer=None)
    for part in assembled.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return assembled


class Capture(TrainerCallback):
    """Copies the gradients before the optimizer uses them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        inner = getattr(model, "module", model)
        self.gradients = {n: w.grad.clone() for n, w in inner.named_parameters() if w.grad is not None}


def trainer_of(
    folder: Path, assembled: AssembledCaptioner, batch_size: int, accumulation: int, **more: Any
) -> CaptionTrainer:
    """The Trainer of `capcli train` for one step."""
    options = TrainOptions(
        data=DataOptions(data=("captions.txt",)),
        model=ModelOptions(encoder=VIT, decoder=GPT2, max_length=40),
        out=str(folder / "out"),
        max_steps=1,
        batch_size=batch_size,
        accumulation=accumulation,
        max_grad_norm=1e9,
        device="cpu",
        workers=0,
        **more,
    )
    trainer = make_trainer(
        options,
        training_arguments(options, str(folder / "out")),
        assembled,
        TrainingData(annotated(folder / "images"), [], DataReport()),
    )
    with Interrupts(quiet=True) as interrupts:
        trainer.add_callback(
            ScheduleCallback(
                options, lambda m: freeze(m, "none"), validates=False, stop=interrupts.asked, write_line=lambda _: None
            )
        )
    return trainer


def gradients(folder: Path, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    trainer = trainer_of(folder, captioner(folder / "decoder"), batch_size, accumulation)
    capture = Capture()
    trainer.add_callback(capture)
    trainer.train()
    return capture.gradients


def save_gradients(folder: Path, batch_size: int, accumulation: int) -> None:
    """What each of two processes runs: the first one writes gradients.pt."""
    found = gradients(folder, batch_size, accumulation)
    assert torch.distributed.get_world_size() == 2
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "gradients.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    save_gradients(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
