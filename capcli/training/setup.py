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
from capcli.models.checkpoint import modules, pixel_size
from capcli.models.encoder_text import gap_names, tag_ids, with_gaps
from capcli.models.families import encoder_prompt_of, tag_room
from capcli.models.hub import find_model
from capcli.options import ModelOptions, TaskOptions, TrainOptions
from capcli.options.train import TAG_TOKENS
from capcli.records import Annotated
from capcli.training.data.dataset import TrainingData
from capcli.training.data.masking import MaskedPairs, encode_words, gaps_of
from capcli.training.data.mixing import TaskMixture
from capcli.training.data.pairs import Collate, Images, Pairs, Tokens
from capcli.training.loop.arguments import loader_workers
from capcli.training.loop.task_validation import CAPTION, MASKED, Validations
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.loop.validation import Validation
from capcli.training.model.assembly import AssembledCaptioner, assemble
from capcli.training.model.tokenizers import encode_captions
from capcli.training.output.folder import sources


def assembled(options: TrainOptions, checkpoint: str | None, data: TrainingData, *, quiet: bool) -> AssembledCaptioner:
    """The captioner before training; as it is at a checkpoint."""
    wanted = options.model
    if options.data.tags_column is not None and wanted.join == "prefix" and wanted.tag_tokens is None:
        wanted = replace(wanted, tag_tokens=TAG_TOKENS)
    if checkpoint is not None:
        wanted = ModelOptions(model=checkpoint, max_length=wanted.max_length)
    return assemble(
        wanted,
        lambda: (text for each in data.train for text in (*each.captions, *([each.tags] if each.tags else ()))),
        options.generation,
        options.data.seed,
        quiet=quiet,
    )


def refuse_unread(options: TrainOptions, *, quiet: bool) -> None:
    """Raises UsageError for tags that the captioner would not read; of one that is gone on from its config.json says so."""
    column, model = options.data.tags_column, options.model.model
    if column is not None and options.model.tag_tokens == 0:
        raise UsageError(
            f"--tags-column is {column}, but --tag-tokens is 0, which leaves no room for tags: leave one out"
        )
    if column is None or model is None:
        return
    if not tag_room(find_model(model, quiet=quiet).config):
        raise UsageError(f"--tags-column is {column}, but {model} reads no tags: leave it out")


def make_trainer(
    options: TrainOptions, arguments: Seq2SeqTrainingArguments, made: AssembledCaptioner, data: TrainingData
) -> CaptionTrainer:
    encode, _ = modules(made.model, made.spec)
    name = options.model.model or "the captioner"
    size = pixel_size(name, encode.size, made.spec, any_size=encode.any_size)
    collate = Collate(size, made.specials.start, made.specials.pad)
    pairs = partial(make_pairs, options=options, made=made, size=size)
    train: Pairs | TaskMixture
    validation: Validation | Validations | None
    if options.task:
        train, validation = make_tasks(options, made, data, size, collate)
    else:
        train = pairs(data.train)
        validation = make_validation(options, pairs(data.val), collate, data.val) if data.val else None
    if options.gradient_checkpointing:
        model: Any = made.model  # under its new name, where it has that
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # which has frozen embeddings give gradients, for the reentrant kind; a model that adds to them in place then fails
        model.disable_input_require_grads()
    trainer = CaptionTrainer(made, arguments, train, collate, validation, options)
    trainer.remove_callback(DefaultFlowCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_pairs(
    annotated: Sequence[Annotated],
    *,
    options: TrainOptions,
    made: AssembledCaptioner,
    size: tuple[int, int],
    asked: str | None = None,
) -> Pairs:
    """Pairs with the question that is asked, None for the one that the model is asked by itself."""
    flat = [text for each in annotated for text in each.captions]
    labels = iter(encode_captions(made.tokenizer, flat, made.specials, made.max_length))
    images = Images(annotated, made.spec, size, options.max_pixels)
    tokens = [[next(labels) for _ in each.captions] for each in annotated]
    return Pairs(images, tokens, encoder_ids(made, asked), tags_of(annotated, made))


def tags_of(annotated: Sequence[Annotated], made: AssembledCaptioner) -> Tokens | None:
    """The tags of each image as a tagged captioner reads them; None for any other captioner."""
    room = tag_room(made.model.config.to_dict())
    return np.array(tag_ids(made.tokenizer, [each.tags for each in annotated], room), np.int32) if room else None


def encoder_ids(made: AssembledCaptioner, asked: str | None) -> Sequence[int]:
    """What the encoder is asked, in a family whose encoder is asked."""
    ask = encoder_prompt_of(made.model.config.to_dict())
    return ask(made.tokenizer, asked) if ask else ()


def make_tasks(
    options: TrainOptions, made: AssembledCaptioner, data: TrainingData, size: tuple[int, int], collate: Collate
) -> tuple[TaskMixture, Validations | None]:
    """The pairs of all tasks, and what validates each. Raises UsageError for a model that cannot learn one of them."""
    ask = encoder_prompt_of(made.model.config.to_dict())
    if ask is None:
        raise UsageError(
            f"a {made.model.config.model_type} is asked nothing, so it learns one task: give a T5 for a decoder"
        )
    keep_question(made.model.config, options.task)
    where = dict(zip(sources(options), data.parts, strict=True))
    learnt, held = [], {}
    for task in options.task:
        train, val = where[task.data]
        if not train:
            raise UsageError(f"task {task.name}: no image is left to train on")
        make = partial(make_task_pairs, task=task, options=options, made=made, size=size)
        learnt.append(make(train))
        if val:
            held[task.name] = make_task_validation(options, task, made, make(val), collate, val)
    weights = [task.weight for task in options.task]
    validating = TaskMixture([each.pairs for each in held.values()], [1.0] * len(held)) if held else None
    kinds = {task.name: task.kind for task in options.task}
    return TaskMixture(learnt, weights), None if validating is None else Validations(validating, collate, held, kinds)


def keep_question(config: Any, tasks: Sequence[TaskOptions]) -> None:
    """Makes what the first captioning task asks what the captioner is asked by itself, where its config holds that."""
    first = next((task.question for task in tasks if task.kind == CAPTION), None)
    if first is not None and hasattr(config, "question"):
        config.question = first


def make_task_pairs(
    annotated: Sequence[Annotated],
    *,
    task: TaskOptions,
    options: TrainOptions,
    made: AssembledCaptioner,
    size: tuple[int, int],
) -> Pairs:
    if task.kind != MASKED:
        return make_pairs(annotated, options=options, made=made, size=size, asked=task.question)
    flat = [text for each in annotated for text in each.captions]
    words = iter(encode_words(made.tokenizer, flat, made.specials))
    images = Images(annotated, made.spec, size, options.max_pixels)
    return MaskedPairs(
        images,
        [[next(words) for _ in each.captions] for each in annotated],
        gaps_of(made.tokenizer),
        made.specials.end,
        made.max_length,
        options.data.seed,
    )


def make_task_validation(
    options: TrainOptions,
    task: TaskOptions,
    made: AssembledCaptioner,
    pairs: Pairs,
    collate: Collate,
    val: Sequence[Annotated],
) -> Validation:
    """As `make_validation`; what is masked in a caption is the same at every evaluation."""
    held = make_validation(options, pairs, collate, val)
    if not isinstance(pairs, MaskedPairs):
        return replace(held, question=task.question, scorer=held.scorer if task.kind == CAPTION else None)
    masked = {str(number): pairs.masked(pairs.first(number)) for number in held.captioned}
    names = gap_names(made.tokenizer)
    answers = {n: [with_gaps(made.tokenizer, answer.tolist(), names)] for n, (_, answer) in masked.items()}
    return replace(held, scorer=None, references=answers, encoder_ids={n: tuple(q) for n, (q, _) in masked.items()})


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
        references,
        Scorer(references) if references else None,
        options.batch_size,
        loader_workers(options),
    )
