"""Builds the Trainer of a run from its options, its data and the captioner to train."""

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
from capcli.models.auto import collect_any
from capcli.models.checkpoint import encode_and_step, pixel_size
from capcli.models.encoder_text import gap_names, tag_ids, with_gaps
from capcli.models.families import encoder_prompt_of, tag_room
from capcli.models.hub import find_model
from capcli.models.model_files import CONFIG, ENGINE, ModelFiles, ModelListing, is_vlm
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
from capcli.training.model.lora import add_lora
from capcli.training.model.tokenizers import encode_captions
from capcli.training.output.folder import sources
from capcli.training.vlm.vlm_assembly import AssembledVlm, assemble_vlm
from capcli.training.vlm.vlm_pairs import VlmCollate, VlmPairs
from capcli.training.vlm.vlm_trainer import VlmTrainer, VlmValidation

Assembled = AssembledCaptioner | AssembledVlm


def assemble_captioner(options: TrainOptions, checkpoint: str | None, data: TrainingData, *, quiet: bool) -> Assembled:
    """The captioner to train: as it was at the checkpoint, or at the start of the run where that is None.

    With --lora it is always the model with a new adapter: the Trainer loads the checkpoint's. Raises what `assemble` raises.
    """
    model = options.model
    if files := vlm_files(options, quiet=quiet):
        return assemble_vlm(options, files)
    if options.data.tags_column is not None and model.join == "prefix" and model.tag_tokens is None:
        model = replace(model, tag_tokens=TAG_TOKENS)
    if options.prompt is not None or options.system is not None:
        raise UsageError(
            f"--prompt and --system are for vision-language models, and {model.model or 'this'} is none: leave them out"
        )
    if checkpoint is not None and not options.lora:
        model = ModelOptions(model=checkpoint, max_length=model.max_length)
    assembled = assemble(
        model,
        lambda: (text for image in data.train for text in (*image.captions, *([image.tags] if image.tags else ()))),
        options.generation,
        options.data.seed,
        quiet=quiet,
    )
    return with_adapter(assembled, options) if options.lora else assembled


def with_adapter(assembled: AssembledCaptioner, options: TrainOptions) -> AssembledCaptioner:
    """The captioner with an adapter, of which alone the weights are trainable."""
    model, line = add_lora(assembled.model, options)
    encode, step = encode_and_step(model.base_model.model, assembled.spec)  # with the layers that the adapter replaced
    return replace(assembled, model=model, encode=encode, step=step, notes=(*assembled.notes, line))


def vlm_files(options: TrainOptions, *, quiet: bool) -> ModelFiles | None:
    """The files of the vision-language model to train; None for any other captioner, of which none are fetched.

    Raises UsageError without --lora.
    """
    if options.model.model is None:
        return None

    def take(name: str, listing: ModelListing, commit: str | None) -> ModelFiles:
        config = listing.read_json(CONFIG) if CONFIG in listing.names and ENGINE not in listing.names else {}
        return collect_any(name, listing, commit) if is_vlm(config) else ModelFiles(name, "", commit, {}, {})

    files = find_model(options.model.model, quiet=quiet, take=take)
    if not files.config:
        return None
    if not options.lora:
        raise UsageError(
            f"{options.model.model} is a vision-language model, of which only an adapter can be trained: give --lora"
        )
    return files


def refuse_unread_tags(options: TrainOptions, *, quiet: bool) -> None:
    """Raises UsageError for a tags column that the captioner would not read."""
    column, model = options.data.tags_column, options.model.model
    if column is not None and options.model.tag_tokens == 0:
        raise UsageError(
            f"--tags-column is {column}, but --tag-tokens is 0, which leaves no room for tags: leave one out"
        )
    if column is None or model is None:
        return
    if vlm_files(options, quiet=quiet):
        if "{tags}" not in (options.prompt or ""):
            raise UsageError(
                f"--tags-column is {column}, but --prompt has no {{tags}} that stands for them: add it, or leave one out"
            )
        return
    if not tag_room(find_model(model, quiet=quiet).config):
        raise UsageError(f"--tags-column is {column}, but {model} reads no tags: leave it out")


def make_trainer(
    options: TrainOptions, arguments: Seq2SeqTrainingArguments, assembled: Assembled, data: TrainingData
) -> CaptionTrainer:
    """The Trainer of a run. Raises UsageError for tasks that the captioner cannot learn."""
    trainer = (
        make_vlm_trainer(options, arguments, assembled, data)
        if isinstance(assembled, AssembledVlm)
        else make_family_trainer(options, arguments, assembled, data)
    )
    trainer.remove_callback(DefaultFlowCallback)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_vlm_trainer(
    options: TrainOptions, arguments: Seq2SeqTrainingArguments, assembled: AssembledVlm, data: TrainingData
) -> CaptionTrainer:
    """The Trainer of a vision-language model's adapter."""
    collate = VlmCollate()
    validation: VlmValidation | None = None
    if data.val:
        pairs = VlmPairs.of(data.val, assembled, options.max_pixels)
        plain: Any = make_validation(options, pairs, collate, data.val)  # type: ignore[arg-type]
        validation = VlmValidation(**vars(plain), assembled=assembled)
    if options.gradient_checkpointing:
        enable_checkpointing(assembled.model)
    train = VlmPairs.of(data.train, assembled, options.max_pixels)
    return VlmTrainer(assembled, arguments, train, collate, validation, options)  # type: ignore[arg-type]


def make_family_trainer(
    options: TrainOptions, arguments: Seq2SeqTrainingArguments, assembled: AssembledCaptioner, data: TrainingData
) -> CaptionTrainer:
    """The Trainer of a captioner of a family in capcli.models."""
    name, encode = options.model.model or "the captioner", assembled.encode
    size = pixel_size(name, encode.size, assembled.spec, any_size=encode.any_size)
    collate = Collate(size, assembled.specials.start, assembled.specials.pad)
    train: Pairs | TaskMixture
    validation: Validation | Validations | None = None
    if options.task:
        train, validation = make_tasks(options, assembled, data, size, collate)
    else:
        pairs = partial(make_pairs, options=options, assembled=assembled, size=size)
        train = pairs(data.train)
        if data.val:
            validation = make_validation(options, pairs(data.val), collate, data.val)
    if options.gradient_checkpointing:
        enable_checkpointing(assembled.model)
    return CaptionTrainer(assembled, arguments, train, collate, validation, options)


def enable_checkpointing(model: Any) -> None:
    """Switches on gradient checkpointing, in its non-reentrant form."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # transformers renames the method
    # For the reentrant form transformers makes frozen embeddings require gradients; models that add to them in place then fail.
    model.disable_input_require_grads()


def make_pairs(
    annotated: Sequence[Annotated],
    *,
    options: TrainOptions,
    assembled: AssembledCaptioner,
    size: tuple[int, int],
    question: str | None = None,
) -> Pairs:
    """The pairs of a split; `question` None is the model's default one, in families whose encoder reads a question."""
    flat = [text for image in annotated for text in image.captions]
    labels = iter(encode_captions(assembled.tokenizer, flat, assembled.specials, assembled.max_length))
    tokens = [[next(labels) for _ in image.captions] for image in annotated]
    images = Images(annotated, assembled.spec, size, options.max_pixels)
    return Pairs(images, tokens, encoder_ids(assembled, question), tags_of(annotated, assembled))


def encoder_ids(assembled: AssembledCaptioner, question: str | None) -> Sequence[int]:
    """The token ids that the encoder reads for a question; none in families whose encoder reads no text."""
    to_ids = encoder_prompt_of(assembled.model.config.to_dict())
    return to_ids(assembled.tokenizer, question) if to_ids else ()


def tags_of(annotated: Sequence[Annotated], assembled: AssembledCaptioner) -> Tokens | None:
    """The tag token ids of each image, [images, tag_tokens]; None for a captioner that reads no tags."""
    room = tag_room(assembled.model.config.to_dict())
    if not room:
        return None
    return np.array(tag_ids(assembled.tokenizer, [image.tags for image in annotated], room), np.int32)


def make_tasks(
    options: TrainOptions, assembled: AssembledCaptioner, data: TrainingData, size: tuple[int, int], collate: Collate
) -> tuple[TaskMixture, Validations | None]:
    """The pairs of all tasks and their validations. Raises UsageError for a task that the model cannot learn."""
    config = assembled.model.config
    if encoder_prompt_of(config.to_dict()) is None:
        raise UsageError(
            f"a {config.model_type} reads no question, so it learns only one task: give a T5 as decoder for several"
        )
    set_default_question(config, options.task)
    part_of = dict(zip(sources(options), data.parts, strict=True))
    training: list[Pairs] = []
    validations: dict[str, Validation] = {}
    for task in options.task:
        train, val = part_of[task.data]
        if not train:
            raise UsageError(f"task {task.name}: no image is left to train on")
        pairs = partial(make_task_pairs, task=task, options=options, assembled=assembled, size=size)
        training.append(pairs(train))
        if val:
            validations[task.name] = make_task_validation(options, task, assembled, pairs(val), collate, val)
    mixture = TaskMixture(training, [task.weight for task in options.task])
    if not validations:
        return mixture, None
    validation_pairs = TaskMixture([each.pairs for each in validations.values()], [1.0] * len(validations))
    kinds = {task.name: task.kind for task in options.task}
    return mixture, Validations(validation_pairs, collate, validations, kinds)


def set_default_question(config: Any, tasks: Sequence[TaskOptions]) -> None:
    """Makes the question of the first captioning task the model's default, where its config has one."""
    first = next((task.question for task in tasks if task.kind == CAPTION), None)
    if first is not None and hasattr(config, "question"):
        config.question = first


def make_task_pairs(
    annotated: Sequence[Annotated],
    *,
    task: TaskOptions,
    options: TrainOptions,
    assembled: AssembledCaptioner,
    size: tuple[int, int],
) -> Pairs:
    """`make_pairs` for one task."""
    if task.kind != MASKED:
        return make_pairs(annotated, options=options, assembled=assembled, size=size, question=task.question)
    flat = [text for image in annotated for text in image.captions]
    words = iter(encode_words(assembled.tokenizer, flat, assembled.specials))
    return MaskedPairs(
        Images(annotated, assembled.spec, size, options.max_pixels),
        [[next(words) for _ in image.captions] for image in annotated],
        gaps_of(assembled.tokenizer),
        assembled.specials.end,
        assembled.max_length,
        options.data.seed,
    )


def make_task_validation(
    options: TrainOptions,
    task: TaskOptions,
    assembled: AssembledCaptioner,
    pairs: Pairs,
    collate: Collate,
    val: Sequence[Annotated],
) -> Validation:
    """`make_validation` for one task; every evaluation masks the same words of a caption."""
    validation = make_validation(options, pairs, collate, val)
    if not isinstance(pairs, MaskedPairs):
        scorer = validation.scorer if task.kind == CAPTION else None
        return replace(validation, question=task.question, scorer=scorer)
    masked = {str(number): pairs.masked(pairs.first(number)) for number in validation.captioned}
    names = gap_names(assembled.tokenizer)
    return replace(
        validation,
        scorer=None,
        references={
            number: [with_gaps(assembled.tokenizer, answer.tolist(), names)] for number, (_, answer) in masked.items()
        },
        encoder_ids={number: tuple(ids) for number, (ids, _) in masked.items()},
    )


def make_validation(
    options: TrainOptions, pairs: Pairs, collate: Collate, annotated: Sequence[Annotated]
) -> Validation:
    """The images to caption are drawn once: they are the same at every evaluation and in every process."""
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
