"""The source of an export: a captioner, whose graphs are exported here (an unfinished engine is in `pending`)."""

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
from capcli.export.cleanup import clean_graph
from capcli.export.folder import copy, writing
from capcli.export.parity import PYTORCH
from capcli.export.quantize import quantize
from capcli.models.attention import use_attention
from capcli.models.checkpoint import encode_and_step, explained_tokenizer, generation_of, load_weights, pixel_size
from capcli.models.dtypes import DTYPES
from capcli.models.families import encoder_prompt_of, family_of, tag_room
from capcli.models.model_files import GENERATION, ModelFiles, fingerprint, list_model, setting_files
from capcli.options import ExportOptions
from capcli.options.export_command import export_command
from capcli.pixels import PixelSpec
from capcli.runtimes.base import SlotRuntime
from capcli.runtimes.eager import Eager

LARGE = 1024  # bytes from which a weight is stored beside its graph
PROMPT = 16  # prompt tokens that plans reserve in addition to the caption


class Origin(Protocol):
    """The source of an export: a captioner, or an engine whose plans are not built yet."""

    generation: dict[str, Any]  # its generation settings
    positions: int  # of its decoder
    size: tuple[int, int]  # of its encoder's pixels
    against: str  # the name of `reference` in messages
    encoder_ids: tuple[int, ...]  # token ids for the encoder in the parity check; empty where the encoder reads none

    def write(self, folder: str, settings: Settings) -> Engine:
        """Writes graphs, tokenizer, processor and settings; returns the content of engine.json without the parity check."""

    def reference(self, device: torch.device) -> SlotRuntime:
        """The runtime that an engine on this device is compared with."""


class CheckpointOrigin:
    """A captioner as an Origin."""

    against = PYTORCH

    def __init__(self, options: ExportOptions, model: ModelFiles, out: str) -> None:
        """Loads the captioner. Raises CapcliError for one that cannot be loaded or exported."""
        self.options, self.model, self.out = options, model, out
        refused = plans_refused(model.config) if options.kind == "tensorrt" else None
        if refused:
            raise CapcliError(f"{options.model} cannot become TensorRT plans: {refused}. Export --onnx")
        self.spec = PixelSpec.from_config(model.processor)
        loaded = load_weights(model, options.dtype, torch.device("cpu"))
        self.encode, self.step = encode_and_step(loaded, self.spec)
        self.size = pixel_size(model.name, self.encode.size, self.spec, any_size=self.encode.any_size)
        self.generation, self.positions = generation_of(model, loaded), self.step.positions
        prompt = encoder_prompt_of(model.config)
        self.encoder_ids = tuple(prompt(explained_tokenizer(model), None)) if prompt else example_tags(model.config)

    def write(self, folder: str, settings: Settings) -> Engine:
        options, model = self.options, self.model
        encode, memory = graphs.encode_graph(self.encode, self.size, options.profile, question=bool(self.encoder_ids))
        step = graphs.step_graph(self.step, memory, DTYPES[options.dtype], options.profile)
        generation, buckets = self.generation, tuple[Bucket, ...]()
        if options.kind == "tensorrt":
            from capcli.export.tensorrt import make_buckets, write_ready

            generation = for_plans(generation, settings)
            entries = memory.image_entries + settings.entries + PROMPT
            buckets = make_buckets(options.batch_sizes, settings.rows, entries)
        with writing(self.out):
            for name, graph in ((ENCODE, encode), (STEP, step)):
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
            command=export_command(options, self.out),
            buckets=buckets,
            capcli=__version__,
            made_with={"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__},
        )

    def reference(self, device: torch.device) -> SlotRuntime:
        """PyTorch in float32, whatever the engine computes in."""
        encode, step = encode_and_step(load_weights(self.model, "float32", device), self.spec)
        use_attention(step.decoder)
        return Eager(encode, step, device, prefixed=encode.prefixed)


def plans_refused(config: Mapping[str, Any]) -> str | None:
    """Why a captioner with this config.json cannot become TensorRT plans; None where it can."""
    if hasattr(family_of(config), "encoder_prompt"):
        return "plans have fixed shapes, and its memory grows with the question that its encoder reads"
    if tag_room(config):
        return "plans take only an image, and it also reads tags"
    return None


def example_tags(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Arbitrary token ids for half of the tag positions of a captioner that reads tags, and NO_TOKEN for the rest."""
    room = tag_room(config)
    count = room - room // 2
    return (*range(count), *(NO_TOKEN,) * (room - count))


def for_plans(generation: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Generation settings whose captions have the shapes of the plans."""
    kept = {name: value for name, value in generation.items() if name != "max_length"}
    return kept | {"num_beams": settings.num_beams, "max_new_tokens": settings.max_new_tokens}


def save(graph: onnx.ModelProto, path: str) -> None:
    """Writes a cleaned graph, with its large weights in one file beside it."""
    clean_graph(graph)
    weights = f"{path}.data"
    for (
        weight
    ) in graph.graph.initializer:  # `save_as_external_data` would refuse a file of that name in the working directory
        if len(weight.raw_data) >= LARGE:
            set_external_data(weight, os.path.basename(weights))
    onnx.save(graph, path)
    if os.path.exists(weights):
        shutil.copymode(path, weights)  # onnx makes it readable by its owner only
