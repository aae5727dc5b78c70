"""A model ready to caption, from a checkpoint or an engine folder: its runtime, tokenizer and pixel specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from capcli.engine.check import refuse_tampered
from capcli.engine.engine_json import Engine
from capcli.errors import CapcliError, UsageError
from capcli.models.adapters import find_with_adapter, is_adapter
from capcli.models.attention import use_attention
from capcli.models.auto import collect_any
from capcli.models.checkpoint import (
    encode_and_step,
    explained_tokenizer,
    generation_of,
    load_weights,
    own_generation,
    pixel_size,
    puts_spaces,
)
from capcli.models.dtypes import DTYPES, choose_device, multiplies_bfloat16
from capcli.models.families import encoder_prompt_of, tag_room
from capcli.models.hub import find_model
from capcli.models.int8 import int8_refused, quantize_both
from capcli.models.model_files import CONFIG, ENGINE, ModelFiles, ModelListing, collect_files, has_family, is_vlm
from capcli.models.packing import speed_up
from capcli.options import DEFAULT_MODEL
from capcli.pixels import PixelSpec
from capcli.progress import warn
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.eager import Eager

KNOWN = 0.9  # fraction of the vocabulary; decoders pad it by fewer tokens


@dataclass(frozen=True)
class Model:
    """A model ready to caption. `Model.of` builds it.

    `encoder_prompt` turns a prompt into token ids where the encoder reads it; None where the decoder does. `spaced` means that
    the tokenizer puts a space between any two tokens, which is wrong between the characters of Chinese or Japanese.
    """

    runtime: SlotRuntime
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    spec: PixelSpec
    size: tuple[int, int]  # height and width of the encoder's input
    generation: dict[str, Any]
    positions: int  # the decoder's maximum sequence length, prompt and caption together
    vocabulary: int
    encoder_prompt: Callable[[Any, str | None], list[int]] | None
    tag_tokens: int  # maximum number of tag tokens that the encoder reads; 0: it reads no tags
    spaced: bool
    engine: Engine | None = None  # the content of engine.json, for an engine

    @classmethod
    def of(cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, **parts: Any) -> Model:
        """Build a model with this config.json; `parts` are the fields that do not follow from config and tokenizer."""
        if len(tokenizer) < KNOWN * parts["vocabulary"]:
            warn(
                f"the tokenizer has {len(tokenizer):,} tokens and the decoder {parts['vocabulary']:,}: tokens that only the "
                "decoder has give no text, and captions may be empty. The tokenizer may belong to another model"
            )
        return cls(
            tokenizer=tokenizer,
            encoder_prompt=encoder_prompt_of(config),
            tag_tokens=tag_room(config),
            spaced=puts_spaces(tokenizer),
            **parts,
        )


def load_model(files: ModelFiles, engine: Engine | None, device: torch.device, dtype: str) -> Model:
    """Load the weights or the engine, and the tokenizer. Raises CapcliError where they cannot be used."""
    return load_checkpoint(files, device, dtype) if engine is None else load_engine(files, engine, device)


def load_checkpoint(files: ModelFiles, device: torch.device, dtype: str) -> Model:
    """Load the weights in a folder into PyTorch modules."""
    spec = PixelSpec.from_config(files.processor)
    whole = load_weights(files, dtype, device)
    encode, step = encode_and_step(whole, spec)
    use_attention(encode.encoder, bfloat16=dtype == "int8" and multiplies_bfloat16())
    attends = use_attention(step.decoder)
    # a bfloat16 cache halves the bytes that a step reads, and captions stay the same (BENCHMARKS.md)
    keep = torch.bfloat16 if dtype == "int8" and attends else None
    if dtype == "int8":
        quantize_both(encode, step)
    elif device.type == "cpu" and dtype != "float16":  # no CPU kernels are faster in float16
        speed_up(encode)
        speed_up(step)
    return Model.of(
        files.config,
        explained_tokenizer(files),
        runtime=Eager(encode, step, device, prefixed=encode.prefixed, keep=keep),
        dtype=dtype,
        spec=spec,
        size=pixel_size(files.name, encode.size, spec, any_size=encode.any_size),
        generation=generation_of(files, whole),
        positions=step.positions,
        vocabulary=step.vocabulary,
    )


def load_engine(files: ModelFiles, engine: Engine, device: torch.device) -> Model:
    """Load an engine folder. Raises CapcliError for one that was modified or was built for another machine."""
    refuse_tampered(files.folder, engine)
    if engine.unfinished:
        raise CapcliError(
            f"the engine {files.name} has no plans yet: finish it on a machine with TensorRT and a GPU: {engine.finish}"
        )
    if not engine.passed:
        warn(
            f"the engine {files.name} failed its parity check ({engine.parity.get('failed')}): its captions may differ"
        )
    return Model.of(
        files.config,
        explained_tokenizer(files),
        runtime=open_engine(files.folder, engine, device),
        dtype=engine.precision,
        spec=PixelSpec.from_config(files.processor),
        size=engine.pixels,
        generation=own_generation(files) or {},
        positions=engine.positions,
        vocabulary=engine.vocabulary,
        engine=engine,
    )


def open_engine(folder: str, engine: Engine, device: torch.device) -> SlotRuntime:
    """The runtime for the graphs or plans of an engine folder. Raises CapcliError where they cannot be run."""
    if engine.kind == "tensorrt":
        from capcli.runtimes.trt import open_trt

        return open_trt(folder, engine, device)
    from capcli.runtimes.ort import open_ort

    return open_ort(folder, engine, device)


def device_of(name: str, engine: Engine | None) -> torch.device:
    """The device for `--device`; for an engine `auto` is a device that it was built for and that its runtime supports."""
    device = choose_device(name)
    if engine is None or engine.kind != "onnx" or name != "auto":
        return device
    from capcli.runtimes.ort import own_device

    return torch.device("cpu") if engine.quantize else own_device(device)


def choose_dtype(name: str, device: torch.device, engine: Engine | None = None) -> str:
    """The dtype for `--dtype`. `auto` is the engine's dtype, else bfloat16 where the hardware computes in it, else float32.

    Raises UsageError for a dtype that the device or the engine does not support.
    """
    if engine is not None and name in ("auto", engine.precision):
        return engine.precision
    if engine is not None and name in DTYPES:
        raise UsageError(f"--dtype {name}: the engine computes in {engine.precision}; leave it out, or export another")
    if name == "int8" and (why := int8_refused(device)):
        raise UsageError(f"--dtype int8: {why}; give --dtype auto")
    if name in DTYPES:
        return name
    if name != "auto":
        raise UsageError(f"--dtype {name}: choose one of auto, {', '.join(DTYPES)}")
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if multiplies_bfloat16() else "float32"


def find_any_model(
    model: str, revision: str | None, backend: str, *, adapter: str | None = None, quiet: bool
) -> ModelFiles:
    """The files of a captioner for a backend: `auto` is the slots backend where it has a family for the model.

    `adapter` is a LoRA adapter; with one, DEFAULT_MODEL stands for its base model. A model may be an adapter alone.
    Raises UsageError and CapcliError as `find_model`.
    """

    def take(name: str, listing: ModelListing, commit: str | None) -> ModelFiles:
        if is_adapter(listing):
            return ModelFiles(name, "", commit, {}, {})
        config = listing.read_json(CONFIG) if CONFIG in listing.names and ENGINE not in listing.names else {}
        slots = not config or has_family(config)
        if backend == "slots":
            slots = not is_vlm(config)
        elif backend == "generate":
            slots = False
        return (collect_files if slots else collect_any)(name, listing, commit)

    find = partial(find_model, quiet=quiet, take=take)
    base = None if adapter is not None and model == DEFAULT_MODEL else model
    return find_with_adapter(find, base, adapter, revision, quiet=quiet)
