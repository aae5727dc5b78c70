"""A captioner's files -> its runtime, tokenizer and pixel arithmetic, on a device and in a dtype."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from capcli.engine.check import refuse_tampered
from capcli.engine.engine_json import Engine
from capcli.errors import CapcliError, UsageError
from capcli.models.abilities import multiplies_bfloat16
from capcli.models.attention import use_attention
from capcli.models.families import family_of, question_of, tag_room
from capcli.models.files import GENERATION, ModelFiles
from capcli.models.int8 import lacking, quantize_both
from capcli.models.load_errors import explain_load_error
from capcli.models.modules import Encode, Step
from capcli.models.packing import speed_up
from capcli.options import check_device
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.runtimes.base import DTYPES, Seated
from capcli.runtimes.eager import Eager


@dataclass(frozen=True)
class Model:
    """A loaded captioner: what runs it, the tokenizer, how pixels are made, its generation_config."""

    runtime: Seated
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    spec: PixelSpec
    size: tuple[int, int]  # height and width of the pixels that the encoder takes
    generation: dict[str, Any]
    positions: int  # the longest sequence, prompt and caption, that the decoder can hold
    vocabulary: int
    question: Callable[[Any, str | None], list[int]] | None  # a prompt's ids, where not the decoder reads it
    tag_tokens: int  # words on an image that its encoder reads at most
    spaced: bool  # the tokenizer's decoder puts spaces between tokens, so between characters where those are the tokens


def load_model(files: ModelFiles, device: torch.device, dtype: str) -> Model:
    """Load weights, or an engine, and the tokenizer. Raises CapcliError when they cannot be used."""
    if files.engine is not None:
        return load_engine(files, files.engine, device)
    spec = PixelSpec.from_config(files.processor)
    whole = load_weights(files, dtype, device)
    encode, step = modules(whole, spec)
    use_attention(encode.encoder, coarse=dtype == "int8" and multiplies_bfloat16())
    attends = use_attention(step.decoder)
    # half as much to read in every step, and no caption the worse for it (BENCHMARKS.md)
    keep = torch.bfloat16 if dtype == "int8" and attends else None
    if dtype == "int8":
        quantize_both(encode, step)
    elif device.type == "cpu" and dtype != "float16":  # which no CPU multiplies fast
        speed_up(encode)
        speed_up(step)
    return Model(
        runtime=Eager(encode, step, device, prefixed=encode.prefixed, keep=keep),
        dtype=dtype,
        tokenizer=(tokenizer := explained_tokenizer(files)),
        spec=spec,
        size=pixel_size(files.name, encode.size, spec, any_size=encode.any_size),
        generation=generation_of(files, whole),
        positions=step.positions,
        vocabulary=step.vocabulary,
        question=question_of(files.config),
        tag_tokens=tag_room(files.config),
        spaced=puts_spaces(tokenizer),
    )


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


def modules(whole: Any, spec: PixelSpec) -> tuple[Encode, Step]:
    """A model's encode and step, where it is."""
    family = family_of(whole.config.to_dict())
    encode = family.Encode(whole, spec.rescale_factor, spec.mean, spec.std)
    return encode.eval().to(whole.device), family.Step(whole).eval()


def generation_of(files: ModelFiles, whole: Any) -> dict[str, Any]:
    """The generation settings of a captioner."""
    return own_generation(files) or family_of(files.config).generation(files.config, whole.generation_config.to_dict())


def load_engine(files: ModelFiles, engine: Engine, device: torch.device) -> Model:
    """What an engine folder holds. Raises CapcliError for one that was changed or built for another machine."""
    refuse_tampered(files.folder, engine)
    if engine.unfinished:
        raise CapcliError(
            f"the engine {files.name} has no plans yet: finish it where TensorRT and a GPU are: {engine.finish}"
        )
    if not engine.passed:
        warn(f"the engine {files.name} failed its proof ({engine.proof.get('failed')}): its captions may differ")
    tokenizer = explained_tokenizer(files)
    return Model(
        runtime=open_engine(files.folder, engine, device),
        dtype=engine.precision,
        tokenizer=tokenizer,
        spec=PixelSpec.from_config(files.processor),
        size=engine.pixels,
        generation=own_generation(files) or {},
        positions=engine.positions,
        vocabulary=engine.vocabulary,
        question=question_of(files.config),
        tag_tokens=tag_room(files.config),
        spaced=puts_spaces(tokenizer),
    )


def open_engine(folder: str, engine: Engine, device: torch.device) -> Seated:
    """What runs an engine folder's graphs or plans. Raises CapcliError where they cannot be run."""
    if engine.kind == "tensorrt":
        from capcli.runtimes.trt import open_trt

        return open_trt(folder, engine, device)
    from capcli.runtimes.ort import open_ort

    return open_ort(folder, engine, device)


def explained_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    with explained(files), quiet_transformers():
        return load_tokenizer(files)


def puts_spaces(tokenizer: Any) -> bool:
    """Whether decoding puts a space between tokens: WordPiece does, and so does a tokenizer without decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and (backend.decoder is None or type(backend.decoder).__name__ == "WordPiece")


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
    return own if files.engine else family_of(files.config).generation(files.config, own)


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


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device that there is, else the CPU. Raises UsageError for one that is not there."""
    check_device(name)
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            there = f"this machine has {count}" if count else "no CUDA device can be used here"
            raise UsageError(f"--device {name}: {there}; --device auto takes what there is")
        device = torch.device("cuda", device.index or 0)
    return device


def device_of(name: str, engine: Engine | None) -> torch.device:
    """`choose_device`, where `auto` is one that the engine was built for and its runtime has."""
    device = choose_device(name)
    if engine is None or engine.kind != "onnx" or name != "auto":
        return device
    from capcli.runtimes.ort import own_device

    return torch.device("cpu") if engine.quantize else own_device(device)


def int8_refused(device: torch.device) -> str | None:
    """Why a device cannot multiply in int8; None where it can."""
    return lacking() if device.type == "cpu" else "it is for CPUs"


def choose_dtype(name: str, device: torch.device, engine: Engine | None = None) -> str:
    """`auto` is an engine's own, or bfloat16 where the hardware computes in it, else float32."""
    if engine is not None and name in ("auto", engine.precision):
        return engine.precision
    if engine is not None and name in DTYPES:
        raise UsageError(f"--dtype {name}: the engine computes in {engine.precision}; leave it out, or export another")
    if name == "int8" and (why := int8_refused(device)):
        raise UsageError(f"--dtype int8: {why}; give --dtype auto")
    if name in DTYPES:
        return name
    if name != "auto":
        raise UsageError(f"--dtype {name}: it is auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if multiplies_bfloat16() else "float32"
