"""Loads a checkpoint folder: weights, tokenizer, generation settings, and the size of its pixels."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from capcli.errors import CapcliError
from capcli.models.adapters import merged
from capcli.models.dtypes import DTYPES
from capcli.models.families import family_of
from capcli.models.load_errors import explain_load_error
from capcli.models.model_files import GENERATION, ModelFiles
from capcli.models.modules import Encode, Step
from capcli.pixels import PixelSpec

# transformers' tokenizers for files that name none, by the decoder; the second for a SentencePiece model.
TOKENIZERS = {
    "gpt2": "GPT2Tokenizer",
    "bert": "BertTokenizer",
    **dict.fromkeys(("roberta", "bart", "trocr"), "RobertaTokenizer"),
}
OFFSET_PIECES = ("XLMRoberta", "MBart")  # beginnings of the classes' names
PIECES_TOKENIZERS = dict.fromkeys(("xlm-roberta", "mbart", "trocr"), "XLMRobertaTokenizer")


def load_weights(files: ModelFiles, dtype: str, device: torch.device) -> Any:
    """The transformers model of a folder, on `device`. Raises CapcliError where it cannot be loaded."""
    with explained(files), quiet_transformers():
        loader = getattr(transformers, family_of(files.config).LOADER)
        loaded: Any = loader.from_pretrained(
            files.folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        model, info = loaded
        refuse_missing(files, info)
        return merged(model, files).eval().to(device)


def encode_and_step(model: Any, spec: PixelSpec) -> tuple[Encode, Step]:
    """A model's encode and step, on its device; they share its weights."""
    family = family_of(model.config.to_dict())
    encode = family.Encode(model, spec.rescale_factor, spec.mean, spec.std)
    return encode.eval().to(model.device), family.Step(model).eval()


def generation_of(files: ModelFiles, model: Any) -> dict[str, Any]:
    """The generation settings of a captioner: of its generation_config.json, else of the loaded model."""
    return own_generation(files) or family_of(files.config).generation(files.config, model.generation_config.to_dict())


def own_generation(files: ModelFiles) -> dict[str, Any] | None:
    """generation_config.json with transformers' defaults and the keys that transformers ignores; None without the file."""
    path = os.path.join(files.folder, GENERATION)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CapcliError(f"Cannot read {path}: {error}.") from error
    if not isinstance(content, dict):
        raise CapcliError(f"{path} is not a JSON object: replace the file.")
    with explained(files), quiet_transformers():
        generation = (
            content | transformers.GenerationConfig.from_pretrained(files.folder, local_files_only=True).to_dict()
        )
    return generation if files.is_engine else family_of(files.config).generation(files.config, generation)


def pixel_size(name: str, size: int | Sequence[int], spec: PixelSpec, *, any_size: bool) -> tuple[int, int]:
    """Height and width that an encoder of image size `size` takes. Raises CapcliError when the processor gives another."""
    takes = (size, size) if isinstance(size, int) else (size[0], size[1])
    makes = (spec.height, spec.width) if spec.height and spec.width else takes
    if makes != takes and not any_size:
        raise CapcliError(
            f"The image processor of {name} produces {makes[1]}x{makes[0]} pixels and its encoder expects {takes[1]}x{takes[0]}: "
            "its preprocessor_config.json belongs to another model"
        )
    return makes


def explained_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    with explained(files), quiet_transformers():
        return load_tokenizer(files)


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; the decoder's class where no file names its class."""
    names = set(os.listdir(files.folder))
    kind: Any = AutoTokenizer
    if "tokenizer.json" not in names and class_in(files.folder) is None:
        known = PIECES_TOKENIZERS if any(name.endswith(".model") for name in names) else TOKENIZERS
        kind = getattr(transformers, known.get(decoder_type(files.config), "AutoTokenizer"))
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(files.folder, local_files_only=True)
    return tokenizer


def class_in(folder: str) -> str | None:
    """The tokenizer's class in a folder's tokenizer_config.json; None where no file names it."""
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    name = content.get("tokenizer_class") if isinstance(content, dict) else None
    return str(name) if name else None


def decoder_type(config: Mapping[str, Any]) -> str:
    """The model_type of a captioner's decoder, or of a decoder alone."""
    decoder = config.get("decoder") or config.get("text_config") or config
    return str(decoder.get("model_type"))


def has_offset_pieces(folder: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder's SentencePiece model has XLM-RoBERTa's ids, which are not those of its pieces."""
    named = class_in(folder)
    return named.startswith(OFFSET_PIECES) if named else decoder_type(config) in PIECES_TOKENIZERS


def puts_spaces(tokenizer: Any) -> bool:
    """Whether decoding puts a space between tokens: WordPiece and tokenizers without a decoder do."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and (backend.decoder is None or type(backend.decoder).__name__ == "WordPiece")


def refuse_missing(files: ModelFiles, info: dict[str, Any]) -> None:
    """Raises CapcliError for missing weights, which transformers would fill at random; captions do not depend on poolers."""
    missing = sorted(name for name in info["missing_keys"] if ".pooler." not in name)
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CapcliError(f"The weights of {files.name} lack {shown}: download or save the model again.")


@contextmanager
def explained(files: ModelFiles) -> Iterator[None]:
    """A context for loading: exceptions become CapcliError with the file and what to do."""
    try:
        yield
    except (CapcliError, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as error:
        raise CapcliError(
            f"{files.name} does not fit the device's memory; try --dtype bfloat16 or --device cpu"
        ) from error
    except Exception as error:
        raise explain_load_error(error, files) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """A context without the warnings and progress bars of loading; the relevant conditions are checked separately."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
