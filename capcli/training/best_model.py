"""The end of a training run: the best checkpoint becomes the captioner in the run's folder, with a model card."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capcli.errors import CapcliError
from capcli.models import adapters, model_files
from capcli.models.checkpoint import puts_spaces
from capcli.models.families import family_of, tag_room
from capcli.options import TaskOptions, TrainOptions
from capcli.records import Annotated
from capcli.storage import atomic
from capcli.training.data.dataset import TrainingData
from capcli.training.loop.callbacks import point_of
from capcli.training.loop.task_validation import MASKED
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.output import checkpoints
from capcli.training.output.card import CardFacts, SplitFacts, shell_word, write_card
from capcli.training.output.folder import CARD, RunFolder, sources
from capcli.training.vlm.vlm_assembly import AssembledVlm

# The generation settings that a card shows.
SEARCH_SETTINGS = {
    *("num_beams", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "min_new_tokens", "length_penalty"),
    *("no_repeat_ngram_size", "repetition_penalty", "early_stopping", "num_return_sequences"),
}
# Names of the number of layers and of the width in the configs of transformers.
LAYERS = ("decoder_layers", "num_hidden_layers", "n_layer", "depths")
WIDTH = ("hidden_size", "n_embd", "embed_dim")


def save_best_model(
    options: TrainOptions,
    folder: RunFolder,
    assembled: AssembledCaptioner | AssembledVlm,
    data: TrainingData,
    trainer: CaptionTrainer,
) -> str:
    """Copies the best checkpoint into the folder and writes the model card.

    Returns a line with its step, its scores and the command that captions with it, and before it a line for each better
    checkpoint that is damaged. Raises CapcliError where no checkpoint is left, and where the folder cannot be written.
    """
    log = trainer.state.log_history
    step, passed_over = best_whole(
        folder.checkpoints, checkpoints.ranking(log, options.select), trainer.state.global_step
    )
    copy_captioner(checkpoints.complete(folder.checkpoints)[step], folder)
    point = next((point_of(entry) for entry in log if entry["step"] == step and "eval_loss" in entry), None)
    scores = dict(point.scores) if point else {}
    loss = point.val_loss if point else None
    write_card(folder.folder, card_facts(options, folder, assembled, data, trainer, step, loss, scores))
    measured = "" if loss is None else f", validation loss {loss:.3f}"
    if loss is not None and "CIDEr" in scores:
        measured += f", CIDEr {scores['CIDEr']:.3f}"
    texts = {"--prompt": options.prompt, "--system": options.system}
    given = "".join(f" {name} {shell_word(text)}" for name, text in texts.items() if text is not None)
    line = f"step {step}{measured}: capcli caption FOLDER --model {shell_word(folder.folder)}{given}"
    return "\n".join([*passed_over, line])


def best_whole(folder: str, ranked: Sequence[tuple[int, checkpoints.Rank]], last: int) -> tuple[int, list[str]]:
    """The step of the best checkpoint up to step `last` whose captioner is whole, and a line for each better one."""
    existing = {step: path for step, path in checkpoints.complete(folder).items() if step <= last}
    best = [step for step in checkpoints.best(folder, ranked, len(existing) + 1) if step in existing]
    passed_over: list[str] = []
    for step in dict.fromkeys((*best, *sorted(existing, reverse=True))):
        damage = checkpoints.find_damage(existing[step], resumed=False)
        if damage is None:
            return step, passed_over
        passed_over.append(f"{os.path.basename(existing[step])} is passed over: {damage}")
    raise CapcliError(
        f"no whole checkpoint is left in {folder}, so there is no model: {'; '.join(passed_over) or 'none'}"
    )


def copy_captioner(checkpoint: str, folder: RunFolder) -> None:
    """Copies the files of a captioner, each atomically, the weights last. run.json lists them before they exist."""
    files = model_files.list_model(checkpoint)
    adapter = [model_files.ADAPTER, adapters.WEIGHTS]
    names = (
        adapter
        if model_files.ADAPTER in files.names
        else [*model_files.setting_files(files.names), *model_files.weight_files(files)]
    )
    folder.add_facts(left=sorted({CARD, *names, *folder.facts().get("left", ())}))
    with folder.writing():
        for name in names:
            atomic.copy(os.path.join(checkpoint, name), folder.path(name))


def card_facts(
    options: TrainOptions,
    folder: RunFolder,
    assembled: AssembledCaptioner | AssembledVlm,
    data: TrainingData,
    trainer: CaptionTrainer,
    step: int,
    loss: float | None,
    scores: Mapping[str, float],
) -> CardFacts:
    """The contents of the model card of the weights of `step`."""
    model, tokens, tokenizer = assembled.model, assembled.specials, assembled.tokenizer
    parts = options.model
    if isinstance(assembled, AssembledVlm):
        encoder, decoder, size = model.config.vision_config, model.config.get_text_config(decoder=True), None
    else:
        encoder, decoder, size = assembled.encode.encoder.config, assembled.step.decoder.config, trainer.collate.size
    given = [part for part in (parts.model, parts.encoder, parts.decoder) if isinstance(part, str)]
    return CardFacts(
        name=os.path.basename(os.path.abspath(folder.folder)),
        encoder=described(encoder, parts.encoder),
        decoder=described(decoder, parts.decoder),
        parameters=model.num_parameters(),
        image_size=size,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        special_tokens={
            role: (str(tokenizer.convert_ids_to_tokens(i)), i)
            for role, i in (("start", tokens.start), ("end", tokens.end), ("pad", tokens.pad))
        },
        data_files=[path for source in sources(options) for path in (*source.data, *source.val_data)],
        splits={"train": split_facts(data.train)} | ({"val": split_facts(data.val)} if data.val else {}),
        left_out=Counter(failure.error for failure in data.report.failures),
        settings=settings_in_force(folder.settings()),
        prompts={task.name: prompt_of(task, model.config) for task in options.task},
        moved_ends=[(at, before, after) for at, before, after in folder.facts().get("moved", ())],
        step=step,
        validation_loss=loss,
        scores=scores,
        validation_images=len(trainer.validation.captioned) if trainer.validation else None,
        generation={
            name: value
            for name, value in model.generation_config.to_dict().items()
            if name in SEARCH_SETTINGS and value is not None
        },
        architecture=model.config.model_type,
        loader=None if options.lora else plain_loader(model),
        spaced=puts_spaces(tokenizer),
        tagged=bool(tag_room(model.config.to_dict())),
        base_models=[name for name in given if not os.path.exists(name)],
    )


def plain_loader(model: Any) -> str | None:
    """transformers' class that captions with a model by itself; None where there is none."""
    family = family_of(model.config.to_dict())
    return None if family.LOADER == "AutoModel" or hasattr(family, "encoder_prompt") else family.LOADER


def settings_in_force(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the number of epochs if a number of steps replaces it."""
    return {name: value for name, value in settings.items() if name != "epochs" or "max_steps" not in settings}


def prompt_of(task: TaskOptions, config: Any) -> str:
    """The prompt of a task; for masked captions an example."""
    if task.kind == MASKED:
        return "a <extra_id_0> on the <extra_id_1>"
    return task.question or getattr(config, "question", None) or ""


def split_facts(images: Sequence[Annotated]) -> SplitFacts:
    return SplitFacts(images=len(images), captions=sum(len(image.captions) for image in images))


def described(config: Any, part: object) -> str:
    """For example "vit, 12 layers, 768 wide, from google/vit-base-patch16-224"; `part` is the value of the part's option."""
    layers = next((value for name in LAYERS if (value := getattr(config, name, None)) is not None), None)
    layers = sum(layers) if isinstance(layers, list | tuple) else layers
    width = next((value for name in WIDTH if (value := getattr(config, name, None)) is not None), None)
    origin = f"from {part}" if isinstance(part, str) and not part.endswith(".json") else "from random weights"
    return f"{config.model_type}, {layers} layers, {width} wide" + ("" if part is None else f", {origin}")
