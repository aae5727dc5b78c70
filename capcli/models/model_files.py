"""The files of a captioner: which ones are needed, in a folder on disk or a repository on the hub."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from capcli.errors import CapcliError
from capcli.text import printable

ENCODERS = (
    *("vit", "deit", "beit", "swin", "swinv2", "donut-swin", "clip_vision_model", "siglip_vision_model"),
    *("dinov2", "dinov2_with_registers"),
)
DECODERS = ("gpt2", "bert", "roberta", "xlm-roberta", "bart", "mbart", "trocr")
WHOLE = {"blip": "BLIP", "git": "GIT", "florence2": "Florence-2"}  # families that are one architecture
# Families of an encoder and a decoder: what their config calls the two, and which kinds they may be.
JOINED = {
    "vision-encoder-decoder": (("encoder", "decoder"), ENCODERS, DECODERS),
    "prefix-captioner": (("vision_config", "text_config"), ("resnet", *ENCODERS), ("gpt2",)),
    "vision-t5": (("vision_config", "text_config"), ("resnet", *ENCODERS), ("t5",)),
}
# Vision-language models that capcli's decode loop runs (capcli.models.vlm): the kinds of their decoders; empty: their own.
USUAL = ("llama", "mistral", "qwen2", "qwen3")
VLMS: Mapping[str, tuple[str, ...]] = {
    "blip-2": ("opt",),
    "gemma3": ("gemma3_text",),
    "idefics3": USUAL,
    "instructblip": ("llama", "opt"),
    "internvl": USUAL,
    "llava": USUAL,
    "llava_onevision": USUAL,
    "paligemma": ("gemma", "gemma2"),
    "qwen2_5_vl": (),
    "qwen2_vl": (),
    "qwen3_vl": (),
    "smolvlm": USUAL,
}
# For models with code of their own: where the same weights are in the format of transformers.
CONVERTED = {
    "florence2": "florence-community has the same weights in the format of transformers, as Florence-2-base and so on."
}

# transformers' image processors by model_type, for settings that name none, as those of the first ViT checkpoints.
PROCESSORS = {
    "beit": "BeitImageProcessor",
    "blip": "BlipImageProcessor",
    "deit": "DeiTImageProcessor",
    "dinov2": "BitImageProcessor",
    "donut-swin": "DonutImageProcessor",
    "florence2": "CLIPImageProcessor",
    "git": "CLIPImageProcessor",
    "resnet": "ConvNextImageProcessor",
    "swin": "ViTImageProcessor",
    "swinv2": "ViTImageProcessor",
    "vit": "ViTImageProcessor",
}

CONFIG = "config.json"
ENGINE = "engine.json"  # of folders that `capcli export` writes
GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"  # of peft
PROCESSOR = "preprocessor_config.json"
PROCESSOR_NESTED = "processor_config.json"
SETTINGS = (CONFIG, GENERATION, PROCESSOR, PROCESSOR_NESTED)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in order of preference; never both
FOREIGN_WEIGHTS = ("tf_model.h5", "flax_model.msgpack", "rust_model.ot")


class IncompleteError(CapcliError):
    """A file that a captioner needs is missing."""


@dataclass(frozen=True)
class ModelFiles:
    """A captioner on this disk: `name` as the user gave it, `revision` the commit of a model from the hub.

    `adapter` is the folder of a LoRA adapter to merge into the weights.
    """

    name: str
    folder: str
    revision: str | None
    config: dict[str, Any]
    processor: dict[str, Any]
    adapter: str | None = None

    @property
    def is_engine(self) -> bool:
        """Whether the folder is an engine."""
        return is_engine(self.folder)


@dataclass(frozen=True)
class ModelListing:
    """The names of the available files (no sub-folders), and `fetch`, which returns the path of one, downloaded if necessary."""

    title: str
    names: frozenset[str]
    fetch: Callable[[str], str]

    def read_json(self, name: str) -> dict[str, Any]:
        """Raises CapcliError when the file is not a JSON object or cannot be read."""
        path = self.fetch(name)
        try:
            with open(path, encoding="utf-8") as file:
                value = json.load(file)
        except OSError as error:
            raise CapcliError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise CapcliError(f"{name} of {self.title} is not JSON ({error}): replace the file.") from error
        if not isinstance(value, dict):
            raise CapcliError(f"{name} of {self.title} is not a JSON object: replace the file.")
        return value


def configured_sequences(model: str) -> int:
    """num_return_sequences in the generation_config of a model folder; 1 for a model that is not downloaded yet."""
    try:
        with open(os.path.join(os.path.expanduser(model), "generation_config.json"), encoding="utf-8") as file:
            count = json.load(file).get("num_return_sequences")
    except (OSError, ValueError, AttributeError, RecursionError):
        return 1
    return count if isinstance(count, int) else 1


def list_model(folder: str, title: str | None = None) -> ModelListing:
    """The files of a folder; messages call it `title`. Raises CapcliError where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            # A dangling link is a missing file: the hub's cache has them when a blob was removed.
            names = frozenset(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise CapcliError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    return ModelListing(title or folder, names, lambda name: os.path.join(folder, name))


def collect_files(name: str, listing: ModelListing, revision: str | None) -> ModelFiles:
    """Fetches the files that captioning needs, the weights last: a folder that has its weights is complete.

    Raises IncompleteError when a file is missing and CapcliError when the architecture is not supported, both before any
    weights are fetched.
    """
    if CONFIG not in listing.names:
        refuse_adapter(listing)
        raise IncompleteError(f"{listing.title} has no {CONFIG}, so it is not a model in the format of transformers.")
    config = listing.read_json(CONFIG)
    check_architecture(name, config)
    settings = setting_files(listing.names)
    processor = processor_of(listing, config)
    weights = weight_files(listing)
    missing = missing_files(listing, settings, processor, weights)
    if not weights:
        refuse_adapter(listing)
    if missing:
        raise IncompleteError(f"{listing.title} lacks {' and '.join(missing)}.")
    paths = [listing.fetch(file) for file in (*settings, *weights)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, processor)


def has_family(config: Mapping[str, Any]) -> bool:
    """Whether a family of capcli.models runs the architecture of a config.json."""
    kind = model_type(config)
    if kind in CONVERTED and "auto_map" in config:
        return False
    if kind not in JOINED:
        return kind in WHOLE
    names, encoders, decoders = JOINED[kind]
    encoder, decoder = (model_type(config.get(part)) for part in names)
    return encoder in encoders and decoder in decoders


def is_vlm(config: Mapping[str, Any]) -> bool:
    """Whether the decode loop runs the vision-language model of a config.json."""
    decoders = VLMS.get(str(model_type(config)))
    return decoders is not None and (not decoders or model_type(config.get("text_config")) in decoders)


def refuse_adapter(listing: ModelListing) -> None:
    """Raises CapcliError for the folder of a LoRA adapter, with its base model and how to merge the two."""
    if ADAPTER not in listing.names:
        return
    base = listing.read_json(ADAPTER).get("base_model_name_or_path")
    named = f"of the model {printable(base)}" if isinstance(base, str) and base else "of a model that it does not name"
    raise CapcliError(
        f"{listing.title} is an adapter (LoRA) {named}, not a whole model. capcli caption takes it; for other commands merge the "
        "two with the peft package, "
        "PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(FOLDER), save the model's tokenizer and "
        "image processor to FOLDER as well, and give --model FOLDER"
    )


def check_architecture(name: str, config: dict[str, Any]) -> None:
    """Raises CapcliError, with the supported architectures, for a config.json of another one."""
    kind = model_type(config)
    if kind in CONVERTED and "auto_map" in config:
        raise CapcliError(f"{name} needs its own code, which capcli never runs. {CONVERTED[kind]}")
    if has_family(config):
        return
    if is_vlm(config):
        raise CapcliError(f"{name} is a vision-language model ({kind}): capcli caption runs it, this command does not")
    names, _, _ = JOINED.get(str(kind), JOINED["vision-encoder-decoder"])
    encoder, decoder = (model_type(config.get(part)) for part in names)
    found = str(kind or config.get("architectures") or "no model_type")
    if kind in JOINED:
        found += f" of {encoder} and {decoder}"
    joined = (
        f"{kind} with an encoder of {', '.join(encoders)} and a decoder of {', '.join(decoders)}"
        for kind, (_, encoders, decoders) in JOINED.items()
    )
    known = "; ".join((*WHOLE.values(), *joined, *VLMS))
    message = f"The architecture of {name} is not supported: {found}. Supported are {known}."
    if "auto_map" in config:
        message += " The model needs its own code, which capcli never runs."
    raise CapcliError(message)


def setting_files(names: frozenset[str]) -> list[str]:
    """The configuration, processor and tokenizer files among `names`."""
    listed = [name for name in (*SETTINGS, *TOKENIZER) if name in names]
    return listed + sorted(name for name in names if name.endswith(".model"))


def weight_files(listing: ModelListing) -> list[str]:
    """The files of the preferred weights, the index of sharded ones first; empty when there are none.

    All shards that the index names are listed, present or not; of an engine all files that engine.json names.
    """
    if ENGINE in listing.names:
        files = listing.read_json(ENGINE).get("files")
        return [ENGINE, *sorted(files if isinstance(files, dict) else [])]
    for whole in WEIGHTS:
        if whole in listing.names:
            return [whole]
        index = f"{whole}.index.json"
        if index in listing.names:
            shards = listing.read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise CapcliError(f"{index} of {listing.title} has no weight_map: replace the file.")
            return [index, *sorted({str(shard) for shard in shards.values()})]
    return []


def fingerprint(folder: str, settings: Callable[[frozenset[str]], Iterable[str]] = setting_files) -> str:
    """The SHA-256 of the files that captions depend on, by name and content; it does not depend on the folder's path.

    `settings` selects those beside the weights from the names in the folder.
    For an engine's files the hashes in engine.json are taken, which are checked when it is loaded; the rest of engine.json
    (parity check, versions, command) changes no caption. Raises CapcliError when a file cannot be read.
    """
    listing = list_model(folder)
    known = listing.read_json(ENGINE)["files"] if ENGINE in listing.names else {}
    result = hashlib.sha256()
    for name in sorted({*settings(listing.names), *weight_files(listing)} - {ENGINE}):
        digest = known.get(name) or file_hash(listing.fetch(name))
        result.update(f"{digest}  {name}\n".encode())
    return result.hexdigest()


def model_type(part: Any) -> str | None:
    """The model type of a config or of a part of one; None for one that names none."""
    kind = part.get("model_type") if isinstance(part, dict) else None
    return kind if isinstance(kind, str) else None


def processor_of(listing: ModelListing, config: Mapping[str, Any]) -> dict[str, Any]:
    """The image processor's settings, from the file that transformers prefers; empty when there are none.

    Where they name no class, that of the model type in `config` is added, as by transformers' AutoImageProcessor.
    """
    settings = processor_settings(listing)
    if not settings or settings.get("image_processor_type") or settings.get("feature_extractor_type"):
        return settings
    encoder, _ = JOINED.get(str(config.get("model_type")), ((None, None),))[0]
    named = (
        config.get("image_processor_type"),
        PROCESSORS.get(str(model_type(config.get(encoder) if encoder else config))),
    )
    return {**settings, "image_processor_type": next(filter(None, named), None)}


def processor_settings(listing: ModelListing) -> dict[str, Any]:
    if PROCESSOR_NESTED in listing.names:
        nested = listing.read_json(PROCESSOR_NESTED).get("image_processor")
        if isinstance(nested, dict):
            return nested
    return listing.read_json(PROCESSOR) if PROCESSOR in listing.names else {}


def missing_files(
    listing: ModelListing, settings: list[str], processor: dict[str, Any], weights: list[str]
) -> list[str]:
    missing = []
    if not processor:
        missing.append(f"{PROCESSOR} (how images are resized and normalised)")
    if not has_tokenizer(settings):
        missing.append("its tokenizer (tokenizer.json, or vocab.json with merges.txt, vocab.txt or a .model file)")
    if not weights:
        foreign = [name for name in FOREIGN_WEIGHTS if name in listing.names]
        note = f"; {foreign[0]} belongs to another framework and cannot be loaded" if foreign else ""
        missing.append(f"weights ({' or '.join(WEIGHTS)}{note})")
    index = weights[0] if weights else ""
    missing.extend(f"{file}, which {index} names" for file in weights if file not in listing.names)
    return missing


def has_tokenizer(files: list[str]) -> bool:
    if "tokenizer.json" in files or "vocab.txt" in files or any(file.endswith(".model") for file in files):
        return True
    return "vocab.json" in files and "merges.txt" in files


def is_engine(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, ENGINE))


def file_hash(path: str) -> str:
    """The SHA-256 of a file. Raises CapcliError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CapcliError(f"{path} cannot be read: {error.strerror}") from error
