"""An encoder or a decoder by itself: from the weights of a folder or the hub, or new from a config, at random."""

from __future__ import annotations

import difflib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers

from capcli.errors import CapcliError, UsageError
from capcli.models.checkpoint import explained, quiet_transformers
from capcli.models.hub import find_model
from capcli.models.model_files import (
    CONFIG,
    DECODERS,
    ENCODERS,
    JOINED,
    WHOLE,
    IncompleteError,
    ModelFiles,
    ModelListing,
    processor_of,
    setting_files,
    weight_files,
)
from capcli.text import printable
from capcli.training.model.positions import set_positions

CLASSES: Mapping[str, str] = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "beit": "BeitModel",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
    "resnet": "ResNetModel",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertLMHeadModel",
    "t5": "T5ForConditionalGeneration",
    "t5-encoder": "T5EncoderModel",
}
KINDS: Mapping[str, tuple[str, ...]] = {
    "encoder": (*ENCODERS, "resnet"),
    "decoder": (*DECODERS, "t5"),
    "question-encoder": ("t5",),
}
CROSS_ATTENTION = ("crossattention", "ln_cross_attn")
HEADS = ("lm_head.", "cls.")
POOLER = "pooler."
SAVED = ("transformers_version", "architectures")  # what transformers writes into a config, and people seldom do
# What configs of any kind may hold: transformers wrote it into all of them once, or reads it from any.
ANY_KIND = frozenset(
    [
        *("add_cross_attention", "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens"),
        *("bos_token_id", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample"),
        *("early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty"),
        *("finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "is_decoder"),
        *("length_penalty", "max_length", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups"),
        *("num_beams", "num_labels", "num_return_sequences", "output_past", "output_scores", "pad_token_id", "prefix"),
        *("pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id"),
        *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder"),
        *("tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "typical_p"),
        *("use_bfloat16", "use_cache", "use_return_dict"),
    ]
)


@dataclass(frozen=True, slots=True)
class Config:
    """What a part is made of: its kind, the values of its config, and its files where it has weights.

    `strange` names, for people, values that its kind does nothing with, in a config that transformers saved itself.
    """

    role: str  # "encoder" or "decoder"
    title: str
    kind: str
    values: Mapping[str, Any]
    files: ModelFiles | None = None
    folder: str | None = None  # where its tokenizer lies, if it has one
    strange: str | None = None

    @property
    def tokenizer_files(self) -> ModelFiles:
        return self.files or ModelFiles(self.title, str(self.folder), None, dict(self.values), {})


@dataclass(frozen=True, slots=True)
class PretrainedPart:
    """A model, and which of its weights its checkpoint lacked: those are random."""

    model: Any
    missing: frozenset[str] = frozenset()


def find_part(role: str, given: str | Mapping[str, Any], *, quiet: bool = False) -> Config:
    """The encoder or decoder that an option names.

    Raises UsageError for what cannot be right, CapcliError for files that cannot be had or are of no supported kind.
    """
    if isinstance(given, Mapping):
        return _new(role, f"the {role} table", given, None)
    path = os.path.expanduser(given)
    if is_config(given):
        return _new(role, given, _read_config(path), os.path.dirname(path) or ".")
    files = find_model(given, quiet=quiet, take=partial(_gather, role), option=f"--{role}")
    kind, values = _kind(role, given, files.config)
    return Config(role, given, kind, values, files, files.folder)


def is_config(given: str | Mapping[str, Any]) -> bool:
    """Whether an option gives a config, of which new weights are made, and no weights."""
    return isinstance(given, Mapping) or (given.endswith(".json") and not os.path.isdir(os.path.expanduser(given)))


def refuse_configs(given: Mapping[str, str | Mapping[str, Any] | None]) -> None:
    """Raises what `find_part` raises of the configs among the parts that are given, by role: nothing is fetched for it."""
    for role, part in given.items():
        if part is not None and is_config(part):
            find_part(role, part)


def config_of(part: Config, **changes: Any) -> Any:
    """Its config as transformers has it, with `changes`. Raises UsageError for values that it refuses."""
    kind = getattr(transformers, CLASSES[part.kind]).config_class
    try:
        with quiet_transformers():
            return kind.from_dict({**part.values, **changes})
    except Exception as error:  # its checks raise types of their own
        raise UsageError(f"No {part.kind} can be made from {part.title}: {_line(error)}") from error


def make_part(part: Config, seed: int, **changes: Any) -> PretrainedPart:
    """The model in float32, with `changes` to its config; what is random in it depends on the seed alone."""
    kind, config = getattr(transformers, CLASSES[part.kind]), config_of(part, **changes)
    if part.files is None:
        return PretrainedPart(_random_model(part, kind, config, seed))
    with explained(part.files), quiet_transformers(), seeded(seed, part.role):
        model, report = kind.from_pretrained(
            part.files.folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    missing = frozenset(report["missing_keys"])
    _refuse_missing(part, missing)
    return PretrainedPart(model, missing)


@contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """Random numbers that the seed and the name of what is drawn decide; the process's own go on afterwards as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {what}".encode()))
        yield


def _random_model(part: Config, kind: Any, config: Any, seed: int) -> Any:
    try:
        with quiet_transformers(), seeded(seed, part.role):
            model = kind(config).float()
        if part.role == "encoder":
            set_positions(model)
        return model
    except MemoryError as error:
        raise CapcliError(f"Not enough memory for {part.title}: make it smaller.") from error
    except Exception as error:  # sizes that do not go together are told by whichever layer meets them
        raise UsageError(f"No {part.kind} can be made from {part.title}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _new(role: str, title: str, values: Mapping[str, Any], folder: str | None) -> Config:
    saved = any(name in values for name in SAVED)
    if values.get("model_type") == "vision-encoder-decoder" and isinstance(values.get(role), Mapping):
        values = values[role]
        saved = saved or any(name in values for name in SAVED)
    kind, values = _kind(role, title, values)
    strange = _strange(title, kind, values)
    if strange and not saved:
        raise UsageError(strange)
    return Config(role, title, kind, values, None, folder, strange)


def _read_config(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CapcliError(f"{path} is not JSON ({error}): replace the file.") from error
    if not isinstance(values, dict):
        raise CapcliError(f"{path} is JSON but no object: replace the file.")
    return values


def _kind(role: str, title: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind, by model_type or else by the class that the config was saved with (rinna's old ones say gpt2-ja)."""
    kind = values.get("model_type")
    if kind not in KINDS[role]:
        kind = _kind_of_class(values.get("architectures")) or kind
    if kind in KINDS[role]:
        return kind, {name: value for name, value in values.items() if name != "model_type"}
    message = f"{title} is of the kind {kind}" if kind else f"{title} has no model_type"
    message += f"; supported as {role} are {', '.join(KINDS[role])}."
    if kind in (*JOINED, *WHOLE):
        message += " It is a whole captioner: --model goes on from it."
    elif "auto_map" in values:
        message += " It brings its own code, which capcli never runs."
    raise UsageError(message)


def _kind_of_class(architectures: object) -> str | None:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    config = getattr(getattr(transformers, str(name), None), "config_class", None)
    return getattr(config, "model_type", None)


def _strange(title: str, kind: str, values: Collection[str]) -> str | None:
    """transformers takes any name and does nothing with most: a slip of the pen would go unnoticed. None: there is none."""
    config = getattr(transformers, CLASSES[kind]).config_class
    known = {*config().to_dict(), *config.attribute_map}
    unknown = [name for name in values if name not in known | ANY_KIND and not name.startswith("_")]
    near = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
    shown = [
        f"{printable(name)} (did you mean {near[name][0]}?)" if near[name] else printable(name) for name in unknown
    ]
    such = "no such setting" if len(unknown) == 1 else "no such settings"
    return f"{title} sets {', '.join(shown)}: {kind} has {such}" if unknown else None


def _gather(role: str, name: str, shelf: ModelListing, revision: str | None) -> ModelFiles:
    """Fetch an encoder's or decoder's files, the weights last; processor and tokenizer are taken where they are."""
    if CONFIG not in shelf.names:
        raise IncompleteError(f"{shelf.title} has no {CONFIG}, so it is no model in the format of transformers.")
    config = shelf.read_json(CONFIG)
    _kind(role, name, config)
    weights = weight_files(shelf)
    lacks = [file for file in weights if file not in shelf.names]
    if lacks or not weights:
        raise IncompleteError(f"{shelf.title} lacks its weights ({lacks[0] if lacks else 'model.safetensors'}).")
    settings = setting_files(shelf.names)
    processor = processor_of(shelf)
    paths = [shelf.fetch(file) for file in (*settings, *weights)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, processor)


def _refuse_missing(part: Config, missing: Collection[str]) -> None:
    """A decoder that was no captioner's lacks cross-attention, one saved without a head the head; it may lack nothing else."""
    random = (*CROSS_ATTENTION, *HEADS) if part.role == "decoder" else (POOLER,)
    lacks = sorted(name for name in missing if not any(sign in name for sign in random))
    if lacks:
        shown = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        raise CapcliError(f"The weights of {part.title} lack {shown}: download or save the model again.")
