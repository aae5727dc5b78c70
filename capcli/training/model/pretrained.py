"""One part of a captioner, encoder or decoder: loaded from a folder or the hub, or new with random weights from a config."""

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
from capcli.models.encoders import POOLER
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
    refuse_adapter,
    setting_files,
    weight_files,
)
from capcli.text import printable

CLASSES: Mapping[str, str] = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "beit": "BeitModel",
    "swin": "SwinModel",
    "swinv2": "Swinv2Model",
    "donut-swin": "DonutSwinModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "resnet": "ResNetModel",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertLMHeadModel",
    "roberta": "RobertaForCausalLM",
    "xlm-roberta": "XLMRobertaForCausalLM",
    "bart": "BartForCausalLM",
    "mbart": "MBartForCausalLM",
    "trocr": "TrOCRForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "t5-encoder": "T5EncoderModel",
}
KINDS: Mapping[str, tuple[str, ...]] = {
    "encoder": (*ENCODERS, "resnet"),
    "decoder": (*DECODERS, "t5"),
    "question-encoder": ("t5",),
}
# Models of image and text whose image encoder is a part: their config holds its config.
VISION_PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Whole BARTs store the decoder's embeddings under another name, and transformers would leave them random.
SHARED = {r"^(model\.)?shared\.": "model.decoder.embed_tokens."}
RENAMED = {"bart": SHARED, "mbart": SHARED}
CROSS_ATTENTION = ("crossattention", "ln_cross_attn", "encoder_attn")
HEADS = ("lm_head.", "cls.", "output_projection.")
SAVED = ("transformers_version", "architectures")  # transformers writes these into every config that it saves
# Keys that a config of any kind may contain: transformers writes or formerly wrote them into all, or reads them from any.
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
class PartConfig:
    """A part before it is loaded: its kind, the values of its config, and its files where it has weights.

    `unused` is a line for the user that names config keys which this kind ignores, in a config that transformers saved.
    """

    role: str  # a key of KINDS
    title: str  # for messages
    kind: str
    values: Mapping[str, Any]
    files: ModelFiles | None = None
    folder: str | None = None  # where its tokenizer is, if it has one
    unused: str | None = None

    @property
    def tokenizer_files(self) -> ModelFiles:
        return self.files or ModelFiles(self.title, str(self.folder), None, dict(self.values), {})


@dataclass(frozen=True, slots=True)
class PretrainedPart:
    """A loaded part; `missing` names the weights that its checkpoint lacked, which are random."""

    model: Any
    missing: frozenset[str] = frozenset()


def find_part(role: str, given: str | Mapping[str, Any], *, quiet: bool = False) -> PartConfig:
    """The part that the option of this role names.

    Raises UsageError for an invalid value, CapcliError for files that cannot be read or are of no supported kind.
    """
    if isinstance(given, Mapping):
        return _from_config(role, f"the {role} table", given, None)
    path = os.path.expanduser(given)
    if is_config(given):
        return _from_config(role, given, _read_config(path), os.path.dirname(path) or ".")
    files = find_model(given, quiet=quiet, take=partial(_fetch_part, role), option=f"--{role}")
    kind, values = _kind(role, given, files.config)
    return PartConfig(role, given, kind, values, files, files.folder)


def is_config(given: str | Mapping[str, Any]) -> bool:
    """Whether an option value is a config, for new random weights, and not a folder or name with weights."""
    return isinstance(given, Mapping) or (given.endswith(".json") and not os.path.isdir(os.path.expanduser(given)))


def refuse_configs(given: Mapping[str, str | Mapping[str, Any] | None]) -> None:
    """Raises what `find_part` raises for the configs among the given parts, by role; fetches nothing."""
    for role, part in given.items():
        if part is not None and is_config(part):
            find_part(role, part)


def config_of(part: PartConfig, **changes: Any) -> Any:
    """The transformers config of a part, with `changes`. Raises UsageError for values that transformers refuses."""
    kind = getattr(transformers, CLASSES[part.kind]).config_class
    try:
        with quiet_transformers():
            return kind.from_dict({**part.values, **changes})
    except Exception as error:  # transformers raises many types here
        raise UsageError(f"Cannot build a {part.kind} from {part.title}: {_first_line(error)}") from error


def make_part(part: PartConfig, seed: int, **changes: Any) -> PretrainedPart:
    """The model in float32, with `changes` to its config; its random weights depend on the seed alone."""
    kind, config = getattr(transformers, CLASSES[part.kind]), config_of(part, **changes)
    if part.files is None:
        return PretrainedPart(_random_model(part, kind, config, seed))
    with explained(part.files), quiet_transformers(), seeded(seed, part.role):
        model, report = kind.from_pretrained(
            part.files.folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            key_mapping=RENAMED.get(part.kind),
        )
    missing = frozenset(report["missing_keys"])
    _refuse_missing(part, missing)
    return PretrainedPart(model, missing)


@contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """torch's random numbers inside depend on `seed` and `what` alone; afterwards the process's generator is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{seed} {what}".encode()))
        yield


def _random_model(part: PartConfig, kind: Any, config: Any, seed: int) -> Any:
    try:
        with quiet_transformers(), seeded(seed, part.role):
            return kind(config).float()
    except MemoryError as error:
        raise CapcliError(f"Not enough memory for {part.title}: make it smaller.") from error
    except Exception as error:  # any layer may refuse sizes that do not fit each other
        raise UsageError(f"Cannot build a {part.kind} from {part.title}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _from_config(role: str, title: str, values: Mapping[str, Any], folder: str | None) -> PartConfig:
    saved = any(name in values for name in SAVED)
    if values.get("model_type") == "vision-encoder-decoder" and isinstance(values.get(role), Mapping):
        values = values[role]
        saved = saved or any(name in values for name in SAVED)
    kind, values = _kind(role, title, values)
    unused = _unused_keys(title, kind, values)
    if unused and not saved:
        raise UsageError(unused)
    return PartConfig(role, title, kind, values, None, folder, unused)


def _read_config(path: str) -> Mapping[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CapcliError(f"{path} is not JSON ({error}): replace the file.") from error
    if not isinstance(values, dict):
        raise CapcliError(f"{path} is JSON but not an object: replace the file.")
    return values


def _kind(role: str, title: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind, from model_type or else from the class in `architectures`, and the values without model_type.

    As an encoder, a CLIP or SigLIP is its vision part. rinna's old configs have the model_type gpt2-ja. Raises UsageError
    for a kind that this role does not support.
    """
    kind = values.get("model_type")
    part = VISION_PARTS.get(str(kind)) if role == "encoder" else None
    if part is not None and isinstance(values.get("vision_config"), Mapping):
        kind, values = part, values["vision_config"]
    if kind not in KINDS[role]:
        kind = _kind_of_class(values.get("architectures")) or kind
    if kind in KINDS[role]:
        return kind, {name: value for name, value in values.items() if name != "model_type"}
    message = f"{title} is of the kind {kind}" if kind else f"{title} has no model_type"
    message += f"; supported as {role} are {', '.join(KINDS[role])}."
    if kind in (*JOINED, *WHOLE):
        message += " It is a whole captioner: give it as --model."
    elif "auto_map" in values:
        message += " It needs its own Python code, which capcli never runs."
    raise UsageError(message)


def _kind_of_class(architectures: object) -> str | None:
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    config = getattr(getattr(transformers, str(name), None), "config_class", None)
    return getattr(config, "model_type", None)


def _unused_keys(title: str, kind: str, values: Collection[str]) -> str | None:
    """A line that names config keys which this kind ignores; None where there are none.

    transformers accepts any key, so a misspelt one would go unnoticed.
    """
    config = getattr(transformers, CLASSES[kind]).config_class
    known = {*config().to_dict(), *config.attribute_map}
    unknown = [name for name in values if name not in known | ANY_KIND and not name.startswith("_")]
    near = {name: difflib.get_close_matches(name, known, 1) for name in unknown}
    shown = [
        f"{printable(name)} (did you mean {near[name][0]}?)" if near[name] else printable(name) for name in unknown
    ]
    noun = "setting" if len(unknown) == 1 else "settings"
    return f"{title} sets {', '.join(shown)}: {kind} has no such {noun}" if unknown else None


def _fetch_part(role: str, name: str, listing: ModelListing, revision: str | None) -> ModelFiles:
    """Fetches the files of a part, the weights last; processor and tokenizer only where they exist."""
    if CONFIG not in listing.names:
        refuse_adapter(listing)
        raise IncompleteError(f"{listing.title} has no {CONFIG}, so it is not a transformers model.")
    config = listing.read_json(CONFIG)
    _kind(role, name, config)
    weights = weight_files(listing)
    missing = [file for file in weights if file not in listing.names]
    if missing or not weights:
        raise IncompleteError(f"{listing.title} lacks its weights ({missing[0] if missing else 'model.safetensors'}).")
    settings = setting_files(listing.names)
    processor = processor_of(listing, config)
    paths = [listing.fetch(file) for file in (*settings, *weights)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, processor)


def _refuse_missing(part: PartConfig, missing: Collection[str]) -> None:
    """Raises CapcliError for missing weights, except those that may be random.

    These are the pooler of an encoder; in a decoder, cross-attention, which a language model has none of, and the head.
    """
    random = (*CROSS_ATTENTION, *HEADS) if part.role == "decoder" else (POOLER,)
    lacks = sorted(name for name in missing if not any(part_name in name for part_name in random))
    if lacks:
        shown = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        raise CapcliError(f"The weights of {part.title} lack {shown}: download or save the model again.")
