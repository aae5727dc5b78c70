"""Exported graphs and engines of random captioners, shared by all tests and test processes: an export takes seconds."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from captioners import HALF, SIZE, random_captioner
from families import FAMILIES, random_of_family
from onnx import numpy_helper
from running import VOCABULARY, call, save_captioner
from torch import nn

from capcli.engine.engine_json import Memory
from capcli.export import graphs
from capcli.models.attention import use_attention
from capcli.models.families import family_of
from capcli.models.modules import Encode, Step

# The captioner of each profile's engine.
KINDS: dict[str, dict[str, Any]] = {
    "fused": {"encoder": "vit", "decoder": "gpt2", "n_layer": 1},
    "portable": {"encoder": "swinv2", "decoder": "bert"},
}
ENCODE_GRAPH, STEP_GRAPH = graphs.encode_graph, graphs.step_graph  # without the cache
REPORT = "report.txt"  # what the export of an engine printed


def built_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """A folder that the first test process to need it fills by `build`: treat it as constant."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder.with_suffix(".done")
        if not done.exists():
            build(folder)
            done.touch()
    return folder


@contextmanager
def cached_graphs(factory: pytest.TempPathFactory) -> Iterator[None]:
    """Within it each captioner's graphs are exported once in a session, by their modules' weights and structure."""

    def encode(module: Encode, size: tuple[int, int], profile: Any, *, question: bool = False) -> Any:
        key = digest(module, size, profile, question)
        return load(key, lambda: ENCODE_GRAPH(module, size, profile, question=question))

    def step(module: Step, memory: Memory, dtype: torch.dtype, profile: Any) -> onnx.ModelProto:
        key = digest(module, memory, dtype, profile)
        graph, _ = load(key, lambda: (STEP_GRAPH(module, memory, dtype, profile), memory))
        return graph

    def load(key: str, export: Callable[[], tuple[onnx.ModelProto, Memory]]) -> tuple[onnx.ModelProto, Memory]:
        def build(folder: Path) -> None:
            graph, memory = export()
            (folder / "graph").write_bytes(pickle.dumps((graph.SerializeToString(), memory)))

        content, memory = pickle.loads((built_once(factory, f"graph-{key}", build) / "graph").read_bytes())
        return onnx.ModelProto.FromString(content), memory

    with mock.patch.multiple(graphs, encode_graph=encode, step_graph=step):
        yield


def digest(module: nn.Module, *arguments: object) -> str:
    """Identifies a module by its structure, numbers, weights and buffers, and the arguments of its export."""
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
    result = hashlib.sha256(f"{module} {numbers} {arguments}".encode())
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        result.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        result.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()[:32]


def built_engine(factory: pytest.TempPathFactory, profile: str) -> Path:
    """A folder with a random captioner, the engine that the command makes of it, and the command's REPORT."""

    def build(folder: Path) -> None:
        save_captioner(folder / "captioner", **KINDS[profile])
        flags = ("--profile", profile, "--threads", 1, "--device", "cpu", "--force")
        with cached_graphs(factory):
            done = call("export", "--onnx", "--model", folder / "captioner", "--out", folder / "engine", *flags)
        assert done.code == 0, done.err
        (folder / REPORT).write_text(done.err)

    return built_once(factory, f"engine-{profile}", build)


@dataclass(frozen=True)
class Exported:
    """A captioner as transformers' model, its modules, and their graphs: treat them as constant."""

    model: Any
    encode: Encode
    step: Step
    encode_graph: onnx.ModelProto
    step_graph: onnx.ModelProto
    memory: Memory


@cache
def exported(kind: str, profile: Any) -> Exported:
    """`kind` is a family, or the decoder of a vision-encoder-decoder: gpt2 with a ViT, bert with a DeiT."""
    captioner = random_of_family(kind) if kind in FAMILIES else random_captioner(**SHARED[kind])
    model = copy.deepcopy(captioner).float()
    modules, family = copy.deepcopy(model), family_of(model.config.to_dict())
    encode, step = family.Encode(modules, 1 / 255, HALF, HALF).eval(), family.Step(modules).eval()
    first, memory = graphs.encode_graph(encode, (SIZE, SIZE), profile)
    second = graphs.step_graph(step, memory, torch.float32, profile)
    use_attention(step.decoder)
    return Exported(model, encode, step, first, second, memory)


# Captioners whose graphs several tests read.
SHARED: dict[str, dict[str, Any]] = {
    "gpt2": {"encoder": "vit", "decoder": "gpt2", "n_layer": 1, "vocabulary": VOCABULARY},
    "bert": {"encoder": "deit", "decoder": "bert", "tie_word_embeddings": True, "vocabulary": VOCABULARY},
}


def duplicate_weights(model: onnx.ModelProto) -> list[str]:
    """A line for each weight whose values, or their transpose, are stored under another name too."""
    first: dict[str, str] = {}
    lines = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        contents = [f"{x.shape} {hashlib.sha256(x.tobytes()).hexdigest()}" for x in (values, values.T)]
        keys = [f"{weight.data_type} {content}" for content in contents]
        for key, how in zip(keys, ("is equal to", "is the transpose of"), strict=False):
            if key in first:
                lines.append(f"{weight.name} {list(weight.dims)} {how} {first[key]}")
                break
        else:
            first[keys[0]] = weight.name
    return lines
