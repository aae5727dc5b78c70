"""What a captioner's folder holds: which of its files are needed, for a folder on disk and a hub repository alike."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capcli.errors import CapcliError

ENCODERS = ("vit", "deit", "beit", "swin", "swinv2")
DECODERS = ("gpt2", "bert")
WHOLE = {"blip": "BLIP", "git": "GIT", "florence2": "Florence-2"}  # families that are one architecture
# Families of an encoder and a decoder: what their config calls the two, and which kinds they may be.
JOINED = {
    "vision-encoder-decoder": (("encoder", "decoder"), ENCODERS, DECODERS),
    "prefix-captioner": (("vision_config", "text_config"), ("resnet", *ENCODERS), ("gpt2",)),
    "vision-t5": (("vision_config", "text_config"), ("resnet", *ENCODERS), ("t5",)),
}
NOT_YET = {"blip-2": "BLIP-2"}
# Where the weights of what brings its own code lie as transformers itself has them.
CONVERTED = {
    "florence2": "florence-community has the same weights for transformers itself, as Florence-2-base and so on."
}

CONFIG = "config.json"
ENGINE = "engine.json"  # of folders that `capcli export` writes
GENERATION = "generation_config.json"
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
    """A file that a captioner needs is not there."""


@dataclass(frozen=True)
class ModelFiles:
    """A captioner on this disk: `name` as the user gave it, `revision` the commit when it came from a hub."""

    name: str
    folder: str
    revision: str | None
    config: dict[str, Any]
    processor: dict[str, Any]

    @property
    def is_engine(self) -> bool:
        """Whether `capcli export` wrote the folder."""
        return is_engine(self.folder)


@dataclass(frozen=True)
class ModelListing:
    """What is there to take (no sub-folders), and `fetch`, which gives the path of a file on this disk."""

    title: str
    names: frozenset[str]
    fetch: Callable[[str], str]

    def read_json(self, name: str) -> dict[str, Any]:
        """Raise CapcliError when the file is no JSON object or cannot be read."""
        path = self.fetch(name)
        try:
            with open(path, encoding="utf-8") as file:
                value = json.load(file)
        except OSError as error:
            raise CapcliError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise CapcliError(f"{name} of {self.title} is not JSON ({error}): replace the file.") from error
        if not isinstance(value, dict):
            raise CapcliError(f"{name} of {self.title} is JSON but no object: replace the file.")
        return value


def list_model(folder: str, title: str | None = None) -> ModelListing:
    try:
        with os.scandir(folder) as entries:
            # A dangling link is a file that is not there: caches have them when a blob was removed.
            names = frozenset(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise CapcliError(f"Cannot read the folder {folder}: {error.strerror}.") from error
    return ModelListing(title or folder, names, lambda name: os.path.join(folder, name))


def collect_files(name: str, shelf: ModelListing, revision: str | None) -> ModelFiles:
    """Fetch all that captioning needs, the weights last: a folder that has its weights has everything.

    Raise IncompleteError when a file is missing and CapcliError when the architecture is not supported; both before any
    weights are fetched.
    """
    if CONFIG not in shelf.names:
        raise IncompleteError(f"{shelf.title} has no {CONFIG}, so it is no model in the format of transformers.")
    config = shelf.read_json(CONFIG)
    check_architecture(name, config)
    settings = setting_files(shelf.names)
    processor = processor_of(shelf)
    weights = weight_files(shelf)
    lacks = _missing(shelf, settings, processor, weights)
    if lacks:
        raise IncompleteError(f"{shelf.title} lacks {' and '.join(lacks)}.")
    paths = [shelf.fetch(file) for file in (*settings, *weights)]
    return ModelFiles(name, os.path.dirname(paths[0]), revision, config, processor)


def check_architecture(name: str, config: dict[str, Any]) -> None:
    """Raise CapcliError, naming what is supported, unless capcli can caption with a model of this config."""
    kind = config.get("model_type")
    if kind in CONVERTED and "auto_map" in config:
        raise CapcliError(f"{name} brings its own code, which capcli never runs. {CONVERTED[kind]}")
    if kind in WHOLE:
        return
    names, encoders, decoders = JOINED.get(str(kind), JOINED["vision-encoder-decoder"])
    encoder, decoder = (_model_type(config.get(part)) for part in names)
    if kind in JOINED and encoder in encoders and decoder in decoders:
        return
    found = str(kind or config.get("architectures") or "no model_type")
    if kind in JOINED:
        found += f" of {encoder} and {decoder}"
    joined = (
        f"{kind} with an encoder of {', '.join(sees)} and a decoder of {', '.join(says)}"
        for kind, (_, sees, says) in JOINED.items()
    )
    known = "; ".join((*WHOLE.values(), *joined))
    message = f"The architecture of {name} is not supported: {found}. Supported are {known}."
    if kind in NOT_YET:
        message += f" {NOT_YET[kind]} is not supported yet."
    elif "auto_map" in config:
        message += " The model brings its own code, which capcli never runs."
    raise CapcliError(message)


def setting_files(names: frozenset[str]) -> list[str]:
    """Give the configuration, processor and tokenizer files among `names`."""
    listed = [name for name in (*SETTINGS, *TOKENIZER) if name in names]
    return listed + sorted(name for name in names if name.endswith(".model"))


def weight_files(shelf: ModelListing) -> list[str]:
    """Give the files of the preferred weights, the index of sharded ones first; nothing when there are none.

    Shards are listed as their index names them, there or not; an engine's files as its engine.json does.
    """
    if ENGINE in shelf.names:
        files = shelf.read_json(ENGINE).get("files")
        return [ENGINE, *sorted(files if isinstance(files, dict) else [])]
    for whole in WEIGHTS:
        if whole in shelf.names:
            return [whole]
        index = f"{whole}.index.json"
        if index in shelf.names:
            shards = shelf.read_json(index).get("weight_map")
            if not isinstance(shards, dict):
                raise CapcliError(f"{index} of {shelf.title} has no weight_map: replace the file.")
            return [index, *sorted({str(shard) for shard in shards.values()})]
    return []


def fingerprint(folder: str) -> str:
    """Give the SHA-256 over the files that decide captions: by name and content, wherever the folder lies.

    Of an engine's files it takes the hashes that engine.json tells, which are held against them when it is loaded; what else
    stands there (proof, versions, command) changes no caption. Raise CapcliError when a file cannot be read.
    """
    shelf = list_model(folder)
    told = shelf.read_json(ENGINE)["files"] if ENGINE in shelf.names else {}
    whole = hashlib.sha256()
    for name in sorted({*setting_files(shelf.names), *weight_files(shelf)} - {ENGINE}):
        digest = told.get(name) or file_hash(shelf.fetch(name))
        whole.update(f"{digest}  {name}\n".encode())
    return whole.hexdigest()


def _model_type(part: Any) -> str | None:
    return part.get("model_type") if isinstance(part, dict) else None


def processor_of(shelf: ModelListing) -> dict[str, Any]:
    """Give the image processor's settings, from where transformers takes them first; empty when there are none."""
    if PROCESSOR_NESTED in shelf.names:
        nested = shelf.read_json(PROCESSOR_NESTED).get("image_processor")
        if isinstance(nested, dict):
            return nested
    return shelf.read_json(PROCESSOR) if PROCESSOR in shelf.names else {}


def _missing(shelf: ModelListing, settings: list[str], processor: dict[str, Any], weights: list[str]) -> list[str]:
    lacks = []
    if not processor:
        lacks.append(f"{PROCESSOR} (how images are resized and normalised)")
    if not _has_tokenizer(settings):
        lacks.append("its tokenizer (tokenizer.json, or vocab.json with merges.txt, vocab.txt or a .model file)")
    if not weights:
        foreign = [name for name in FOREIGN_WEIGHTS if name in shelf.names]
        note = f"; {foreign[0]} is of another framework and cannot be loaded" if foreign else ""
        lacks.append(f"weights ({' or '.join(WEIGHTS)}{note})")
    index = weights[0] if weights else ""
    lacks.extend(f"{file}, which {index} names" for file in weights if file not in shelf.names)
    return lacks


def _has_tokenizer(files: list[str]) -> bool:
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
