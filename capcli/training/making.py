"""From options, data and an untrained captioner to the Trainer that trains it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import Seq2SeqTrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback

from capcli.errors import UsageError
from capcli.metrics import Scorer
from capcli.models.build import modules, pixel_size
from capcli.models.families import family_of
from capcli.models.tags import tag_ids
from capcli.options import ModelOptions, TrainOptions
from capcli.options.model import TAG_TOKENS
from capcli.records import Annotated
from capcli.training.arguments import loader_workers
from capcli.training.assembly import Untrained, assemble
from capcli.training.data import Data
from capcli.training.pairs import Collate, Images, Pairs, Tokens
from capcli.training.trainer import CaptionTrainer
from capcli.training.validation import Validation
from capcli.training.vocabulary import encode_captions


def assembled(options: TrainOptions, checkpoint: str | None, data: Data, *, quiet: bool) -> Untrained:
    """The captioner before training; as it is at a checkpoint."""
    wanted = options.model
    if options.data.tags_column is not None and wanted.join == "prefix" and wanted.tag_tokens is None:
        wanted = replace(wanted, tag_tokens=TAG_TOKENS)
    if checkpoint is not None:
        wanted = ModelOptions(model=checkpoint, max_length=wanted.max_length)
    made = assemble(
        wanted,
        lambda: (text for each in data.train for text in (*each.captions, *([each.tags] if each.tags else ()))),
        options.generation,
        options.data.seed,
        quiet=quiet,
    )
    if options.data.tags_column is not None and not getattr(made.model.config, "tag_tokens", 0):
        raise UsageError(f"tags_column is {options.data.tags_column}, but {wanted.model} reads no tags: leave it out")
    return made


def make_trainer(
    options: TrainOptions, arguments: Seq2SeqTrainingArguments, made: Untrained, data: Data
) -> CaptionTrainer:
    encode, _ = modules(made.model, made.spec)
    name = options.model.model or "the captioner"
    size = pixel_size(name, encode.size, made.spec, any_size=encode.any_size)
    collate = Collate(size, made.specials.start, made.specials.pad)
    pairs = partial(make_pairs, options=options, made=made, size=size)
    if options.gradient_checkpointing:
        model: Any = made.model  # under its new name, where it has that
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    validation = make_validation(options, pairs(data.val), collate, data.val) if data.val else None
    trainer = CaptionTrainer(
        made,
        arguments,
        pairs(data.train),
        collate,
        validation,
        label_smoothing=options.label_smoothing,
        freezes=options.freeze != "none",
    )
    trainer.remove_callback(DefaultFlowCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_pairs(
    annotated: Sequence[Annotated], *, options: TrainOptions, made: Untrained, size: tuple[int, int]
) -> Pairs:
    flat = [text for each in annotated for text in each.captions]
    labels = iter(encode_captions(made.tokenizer, flat, made.specials, made.max_length))
    images = Images(annotated, made.spec, size, options.max_pixels)
    tokens = [[next(labels) for _ in each.captions] for each in annotated]
    return Pairs(images, tokens, question(made), tags_of(annotated, made))


def tags_of(annotated: Sequence[Annotated], made: Untrained) -> Tokens | None:
    """The tags of each image as a tagged captioner reads them; None for any other captioner."""
    room: int = getattr(made.model.config, "tag_tokens", 0)
    return np.array(tag_ids(made.tokenizer, [each.tags for each in annotated], room), np.int32) if room else None


def question(made: Untrained) -> Sequence[int]:
    """What the encoder is asked when nothing else is, in a family whose encoder is asked."""
    ask = getattr(family_of(made.model.config.to_dict()), "question", None)
    return ask(made.tokenizer, None) if ask else ()


def make_validation(
    options: TrainOptions, pairs: Pairs, collate: Collate, annotated: Sequence[Annotated]
) -> Validation:
    """Captions are made for some of the images, drawn once: the same at every evaluation, and in every process."""
    count = min(options.caption_images, len(annotated))
    captioned = random.Random(options.data.seed).sample(range(len(annotated)), count)
    references = {str(index): annotated[index].captions for index in captioned}
    return Validation(
        pairs,
        collate,
        captioned,
        Scorer(references) if references else None,
        options.batch_size,
        loader_workers(options),
    )
