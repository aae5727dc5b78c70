"""What a training run leaves in its folder: the best checkpoint as a captioner, with its model card."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from capcli.models import model_files
from capcli.models.checkpoint import modules, puts_spaces
from capcli.models.families import family_of, tag_room
from capcli.options import TaskOptions, TrainOptions
from capcli.records import Annotated
from capcli.training.data.dataset import TrainingData
from capcli.training.loop.reporting import point_of
from capcli.training.loop.task_validation import MASKED
from capcli.training.loop.trainer import CaptionTrainer
from capcli.training.model.assembly import AssembledCaptioner
from capcli.training.output import checkpoints
from capcli.training.output.card import CARD, CardFacts, SplitFacts, shell_word, write_card
from capcli.training.output.folder import RunFolder, sources

# What a card tells of how captions are searched for: those of a generation_config that a reader can do something with.
SEARCH = {
    *("num_beams", "do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "min_new_tokens", "length_penalty"),
    *("no_repeat_ngram_size", "repetition_penalty", "early_stopping", "num_return_sequences"),
}
DEPTH = ("num_hidden_layers", "n_layer", "depths")
WIDTH = ("hidden_size", "n_embd", "embed_dim")


def leave_captioner(
    options: TrainOptions, place: RunFolder, made: AssembledCaptioner, data: TrainingData, trainer: CaptionTrainer
) -> str:
    """Puts the best checkpoint into the folder itself, with a model card; gives a line that says how good it is."""
    log = trainer.state.log_history
    there = checkpoints.whole(place.checkpoints)
    ranked = checkpoints.best(place.checkpoints, checkpoints.ranking(log, options.select), 1)
    step = ranked[0] if ranked else max(there)
    put_in_place(there[step], place)
    point = next((point_of(entry) for entry in log if entry["step"] == step and "eval_loss" in entry), None)
    scores = dict(point.scores) if point else {}
    loss = point.val_loss if point else None
    write_card(place.folder, card_facts(options, place, made, data, trainer, step, loss, scores))
    good = (
        ""
        if loss is None
        else f", validation loss {loss:.3f}"
        + "".join(f", {name} {scores[name]:.3f}" for name in ("CIDEr",) if name in scores)
    )
    return f"step {step}{good}: capcli caption FOLDER --model {shell_word(place.folder)}"


def put_in_place(checkpoint: str, place: RunFolder) -> None:
    """Copies a checkpoint's captioner; each file is there whole or not at all, the weights last."""
    shelf = model_files.list_model(checkpoint)
    names = [*model_files.setting_files(shelf.names), *model_files.weight_files(shelf)]
    place.remember(left=sorted({CARD, *names, *place.recall().get("left", ())}))
    for name in names:
        temporary = place.path(f"{name}.tmp")
        shutil.copyfile(os.path.join(checkpoint, name), temporary)
        os.replace(temporary, place.path(name))


def card_facts(
    options: TrainOptions,
    place: RunFolder,
    made: AssembledCaptioner,
    data: TrainingData,
    trainer: CaptionTrainer,
    step: int,
    loss: float | None,
    scores: Mapping[str, float],
) -> CardFacts:
    model, (encode, speak) = made.model, modules(made.model, made.spec)
    tokens, family = made.specials, family_of(model.config.to_dict())
    given = options.model
    named = [part for part in (given.model, given.encoder, given.decoder) if isinstance(part, str)]
    return CardFacts(
        name=os.path.basename(os.path.abspath(place.folder)),
        encoder=described(encode.encoder.config, given.encoder),
        decoder=described(speak.decoder.config, given.decoder),
        parameters=model.num_parameters(),
        image_size=trainer.collate.size,
        tokenizer=f"{type(made.tokenizer).__name__}, {len(made.tokenizer):,} tokens",
        special_tokens={
            role: (str(made.tokenizer.convert_ids_to_tokens(i)), i)
            for role, i in (("start", tokens.start), ("end", tokens.end), ("pad", tokens.pad))
        },
        data_files=[path for data in sources(options) for path in (*data.data, *data.val_data)],
        splits={"train": split(data.train)} | ({"val": split(data.val)} if data.val else {}),
        left_out=Counter(failure.error for failure in data.report.failures),
        settings=in_force(place.settings()),
        prompts={task.name: prompt_of(task, model.config) for task in options.task},
        moved_ends=[(at, before, after) for at, before, after in place.recall().get("moved", ())],
        step=step,
        validation_loss=loss,
        scores=scores,
        validation_images=len(trainer.validation.captioned) if trainer.validation else None,
        generation={k: v for k, v in model.generation_config.to_dict().items() if k in SEARCH and v is not None},
        architecture=model.config.model_type,
        loader=None if family.LOADER == "AutoModel" or hasattr(family, "encoder_prompt") else family.LOADER,
        spaced=puts_spaces(made.tokenizer),
        tagged=bool(tag_room(model.config.to_dict())),
        base_models=[name for name in named if not os.path.exists(name)],
    )


def in_force(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the epochs that a number of steps stands in place of."""
    return {name: value for name, value in settings.items() if name != "epochs" or "max_steps" not in settings}


def prompt_of(task: TaskOptions, config: Any) -> str:
    """What asks for a task; of masked captions an example."""
    if task.kind == MASKED:
        return "a <extra_id_0> on the <extra_id_1>"
    return task.question or getattr(config, "question", None) or ""


def split(annotated: Sequence[Annotated]) -> SplitFacts:
    return SplitFacts(images=len(annotated), captions=sum(len(each.captions) for each in annotated))


def described(config: Any, given: object) -> str:
    """ViT, 12 layers, 768 wide, and where its weights are from."""
    layers = next((value for name in DEPTH if (value := getattr(config, name, None)) is not None), None)
    layers = sum(layers) if isinstance(layers, list | tuple) else layers
    width = next((value for name in WIDTH if (value := getattr(config, name, None)) is not None), None)
    origin = f"from {given}" if isinstance(given, str) and not given.endswith(".json") else "from random weights"
    return f"{config.model_type}, {layers} layers, {width} wide" + ("" if given is None else f", {origin}")
