"""What an export begins from: a captioner, whose graphs are exported here, or an engine that waits for TensorRT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from typing import Any, Protocol

import onnx
import torch
import transformers
from onnx.external_data_helper import set_external_data

from capcli import __version__
from capcli.decoding.settings import NO_TOKEN, Settings
from capcli.engine.engine_json import ENCODE, STEP, Bucket, Engine
from capcli.errors import CapcliError
from capcli.export import graphs
from capcli.export.folder import copy, written
from capcli.export.parity import PYTORCH
from capcli.export.quantize import quantize
from capcli.export.tidy import share_weights
from capcli.models.attention import use_attention
from capcli.models.checkpoint import explained_tokenizer, generation_of, load_weights, modules, pixel_size
from capcli.models.dtypes import DTYPES
from capcli.models.families import encoder_prompt_of, family_of, tag_room
from capcli.models.model_files import GENERATION, ModelFiles, fingerprint, list_model, setting_files
from capcli.options import ExportOptions
from capcli.pixels import PixelSpec
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.eager import Eager

LARGE = 1024  # bytes from which a weight is stored beside its graph
PROMPT = 16  # tokens of a prompt that plans have room for besides the caption


class Origin(Protocol):
    """What an export begins from: a captioner, or an engine that waits for TensorRT."""

    generation: dict[str, Any]  # its own settings
    positions: int  # of its decoder
    size: tuple[int, int]  # of its encoder's pixels
    against: str  # how people know `truth`
    encoder_ids: tuple[int, ...]  # what its encoder is asked in the proof; none where it reads nothing beside the image

    def write(self, folder: str, settings: Settings) -> Engine:
        """Graphs, tokenizer, processor and settings; what engine.json will say but for the proof."""

    def truth(self, device: torch.device) -> SlotRuntime:
        """What says the right captions, for an engine on this device."""


class CheckpointOrigin:
    """A captioner as an Origin."""

    against = PYTORCH

    def __init__(self, options: ExportOptions, model: ModelFiles, out: str) -> None:
        self.options, self.model, self.out = options, model, out
        refused = plans_refused(model.config) if options.kind == "tensorrt" else None
        if refused:
            raise CapcliError(f"{options.model} cannot become TensorRT plans: {refused}. Export --onnx")
        self.spec = PixelSpec.from_config(model.processor)
        whole = load_weights(model, options.dtype, torch.device("cpu"))
        self.encode, self.step = modules(whole, self.spec)
        self.size = pixel_size(model.name, self.encode.size, self.spec, any_size=self.encode.any_size)
        self.generation, self.positions = generation_of(model, whole), self.step.positions
        ask = encoder_prompt_of(model.config)
        self.encoder_ids = tuple(ask(explained_tokenizer(model), None)) if ask else tags(model.config)

    def write(self, folder: str, settings: Settings) -> Engine:
        options, model = self.options, self.model
        first, memory = graphs.encode_graph(self.encode, self.size, options.profile, asked=bool(self.encoder_ids))
        second = graphs.step_graph(self.step, memory, DTYPES[options.dtype], options.profile)
        generation, buckets = self.generation, tuple[Bucket, ...]()
        if options.kind == "tensorrt":
            from capcli.export.tensorrt import make_buckets, write_ready

            generation = built_in(generation, settings)
            entries = memory.image_entries + settings.entries + PROMPT
            buckets = make_buckets(options.batch_sizes, settings.rows, entries)
        with written(self.out):
            for name, graph in ((ENCODE, first), (STEP, second)):
                if options.quantize:
                    graph = quantize(graph, self.step.vocabulary if name == STEP else None)
                save(graph, os.path.join(folder, name))
            if options.kind == "tensorrt":
                write_ready(folder, (ENCODE, STEP))
            with open(os.path.join(folder, GENERATION), "w", encoding="utf-8") as file:
                json.dump(generation, file, indent=2)
        for name in setting_files(list_model(model.folder).names):
            if name != GENERATION:
                copy(os.path.join(model.folder, name), os.path.join(folder, name))
        return Engine(
            kind=options.kind,
            profile=options.profile,
            opset=graphs.OPSET[options.profile],
            dtype=options.dtype,
            quantize=options.quantize,
            captioner={"name": model.name, "revision": model.revision, "fingerprint": fingerprint(model.folder)},
            pixels=self.size,
            memory=memory,
            positions=self.positions,
            vocabulary=self.step.vocabulary,
            command=command(options, self.out),
            buckets=buckets,
            capcli=__version__,
            made_with={"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__},
        )

    def truth(self, device: torch.device) -> SlotRuntime:
        """PyTorch in float32, whatever the engine computes in."""
        torch.backends.cudnn.allow_tf32 = False  # it is float32 in its convolutions too
        encode, step = modules(load_weights(self.model, "float32", device), self.spec)
        use_attention(step.decoder)
        return Eager(encode, step, device, prefixed=encode.prefixed)


def plans_refused(config: Mapping[str, Any]) -> str | None:
    """Why a captioner with this config.json cannot become TensorRT plans; None where it can."""
    if hasattr(family_of(config), "encoder_prompt"):
        return "they have one shape, and its memory grows with the question that its encoder is asked"
    if tag_room(config):
        return "these take an image alone, and it reads tags too"
    return None


def tags(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Any words for half of the places that a captioner of tagged images has for them, and none for the others."""
    room = tag_room(config)
    words = room - room // 2
    return (*range(words), *(NO_TOKEN,) * (room - words))


def built_in(generation: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Generation settings by which captions have the shapes that plans were built for."""
    kept = {name: value for name, value in generation.items() if name != "max_length"}
    return kept | {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}


def command(options: ExportOptions, out: str) -> tuple[str, ...]:
    """What builds the engine again, in its place."""
    given: list[tuple[str, object]] = [
        ("--model", os.path.abspath(options.model) if os.path.isdir(options.model) else options.model),
        ("--out", out),
        ("--revision", options.revision),
        ("--dtype", options.dtype),
    ]
    given += [("--profile", options.profile), ("--quantize", options.quantize)]
    if options.kind == "tensorrt":
        given += [("--num-beams", options.num_beams), ("--max-new-tokens", options.max_new_tokens)]
        given += [("--batch-sizes", ",".join(map(str, options.batch_sizes)))]
    given += [("--device", None if options.device == "auto" else options.device)]
    said = [part for name, value in given if value is not None for part in (name, str(value))]
    said += ["--force"] * options.force
    return ("capcli", "export", "--onnx" if options.kind == "onnx" else "--trt", *said, "--overwrite")


def save(graph: onnx.ModelProto, path: str) -> None:
    """A graph with its weights in one file beside it."""
    share_weights(graph)
    weights = f"{path}.data"
    for weight in graph.graph.initializer:  # `save_as_external_data` minds a file of that name in the working directory
        if len(weight.raw_data) >= LARGE:
            set_external_data(weight, os.path.basename(weights))
    onnx.save(graph, path)
    if os.path.exists(weights):
        shutil.copymode(path, weights)  # which onnx leaves readable by its owner alone
