"""A checkpoint folder, loaded: weights, tokenizer, generation settings, and the size of its pixels."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from capcli.errors import CapcliError
from capcli.models.dtypes import DTYPES
from capcli.models.families import family_of
from capcli.models.load_errors import explain_load_error
from capcli.models.model_files import GENERATION, ModelFiles
from capcli.models.modules import Encode, Step
from capcli.pixels import PixelSpec


def load_weights(files: ModelFiles, dtype: str, device: torch.device) -> Any:
    """transformers' model of a folder, whole."""
    with explained(files), quiet_transformers():
        loader = getattr(transformers, family_of(files.config).LOADER)
        loaded: Any = loader.from_pretrained(
            files.folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
        )
        model, report = loaded
        refuse_missing(files, report)
        return model.eval().to(device)


def encode_and_step(whole: Any, spec: PixelSpec) -> tuple[Encode, Step]:
    """The family's Encode and Step over a model: they share its weights and are on its device, in eval mode."""
    family = family_of(whole.config.to_dict())
    encode = family.Encode(whole, spec.rescale_factor, spec.mean, spec.std)
    return encode.eval().to(whole.device), family.Step(whole).eval()


def generation_of(files: ModelFiles, whole: Any) -> dict[str, Any]:
    """The generation settings of a captioner."""
    return own_generation(files) or family_of(files.config).generation(files.config, whole.generation_config.to_dict())


def own_generation(files: ModelFiles) -> dict[str, Any] | None:
    """A captioner's generation_config as its model will have it, and what transformers would pass over; None without a file."""
    path = os.path.join(files.folder, GENERATION)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            written = json.load(file)
    except (OSError, ValueError) as error:
        raise CapcliError(f"Cannot read {path}: {error}.") from error
    if not isinstance(written, dict):
        raise CapcliError(f"{path} is JSON but no object: replace the file.")
    with explained(files), quiet_transformers():
        own = written | transformers.GenerationConfig.from_pretrained(files.folder, local_files_only=True).to_dict()
    return own if files.is_engine else family_of(files.config).generation(files.config, own)


def pixel_size(name: str, size: int | Sequence[int], spec: PixelSpec, *, any_size: bool) -> tuple[int, int]:
    """Height and width that an encoder of this `image_size` takes. Raises CapcliError when the processor makes another."""
    takes = (size, size) if isinstance(size, int) else (size[0], size[1])
    makes = (spec.height, spec.width) if spec.height and spec.width else takes
    if makes != takes and not any_size:
        raise CapcliError(
            f"The image processor of {name} makes {makes[1]}x{makes[0]} pixels and its encoder takes {takes[1]}x{takes[0]}: "
            "its preprocessor_config.json is of another model"
        )
    return makes


def explained_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    with explained(files), quiet_transformers():
        return load_tokenizer(files)


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; one that says nothing of its kind gets the decoder's own."""
    names = set(os.listdir(files.folder))
    if not names & {"tokenizer.json", "tokenizer_config.json"}:
        speaks = files.config.get("decoder") or files.config["text_config"]
        kind: Any = {"gpt2": transformers.GPT2Tokenizer, "bert": transformers.BertTokenizer}[speaks["model_type"]]
    else:
        kind = AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(files.folder, local_files_only=True)
    return tokenizer


def puts_spaces(tokenizer: Any) -> bool:
    """Whether decoding puts a space between tokens: WordPiece does, and so does a tokenizer without decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and (backend.decoder is None or type(backend.decoder).__name__ == "WordPiece")


def refuse_missing(files: ModelFiles, report: dict[str, Any]) -> None:
    """transformers fills weights that a checkpoint lacks at random; only those that no caption needs may be missing."""
    lacks = sorted(name for name in report["missing_keys"] if ".pooler." not in name)
    if lacks:
        shown = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        raise CapcliError(f"The weights of {files.name} lack {shown}: download or save the model again.")


@contextmanager
def explained(files: ModelFiles) -> Iterator[None]:
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
    """Loading says nothing a user of capcli can act on; what matters is checked here."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
