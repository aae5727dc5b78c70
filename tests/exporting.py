"""Random captioners' graphs. An export takes 15 seconds, so each graph is exported once for all tests of all processes."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from captioners import HALF, SIZE, random_captioner
from families import FAMILIES, random_of_family

from capcli.engine.engine_json import Memory
from capcli.export.graphs import encode_graph, step_graph
from capcli.models.attention import use_attention
from capcli.models.families import family_of
from capcli.models.modules import Encode, Step


@dataclass(frozen=True)
class Exported:
    """A captioner, transformers' own, its modules, and their graphs: treat them as constant."""

    model: Any
    encode: Encode
    step: Step
    encode_graph: onnx.ModelProto
    step_graph: onnx.ModelProto
    memory: Memory


@cache
def exported(kind: str, profile: Any) -> Exported:
    """`kind` is a family, or the decoder of a ViT's vision-encoder-decoder."""
    whole = random_of_family(kind) if kind in FAMILIES else random_captioner("vit", kind, seed=5)
    model = copy.deepcopy(whole).float()
    own, family = copy.deepcopy(model), family_of(model.config.to_dict())
    encode, step = family.Encode(own, 1 / 255, HALF, HALF).eval(), family.Step(own).eval()
    first, memory = encode_graph_once(encode, (SIZE, SIZE), profile)
    second = step_graph_once(step, memory, torch.float32, profile)
    use_attention(step.decoder)
    return Exported(model, encode, step, first, second, memory)


def encode_graph_once(
    encode: Encode, size: tuple[int, int], profile: Any, *, asked: bool = False
) -> tuple[onnx.ModelProto, Memory]:
    """`encode_graph`, or the stored result of the same call for an equal module."""
    made: tuple[onnx.ModelProto, Memory] = stored(
        (encode, tuple(size), profile, asked), lambda: encode_graph(encode, size, profile, asked=asked)
    )
    return made


def step_graph_once(step: Step, memory: Memory, dtype: torch.dtype, profile: Any) -> onnx.ModelProto:
    """`step_graph`, or the stored result of the same call for an equal module."""
    made: onnx.ModelProto = stored((step, memory, dtype, profile), lambda: step_graph(step, memory, dtype, profile))
    return made


def stored(call: tuple[Any, ...], export: Callable[[], Any]) -> Any:
    """The result of `export`, stored in a file named by the digest of all that it depends on; every caller gets another copy."""
    path = Path(os.environ["CAPCLI_TEST_SHARED"]) / f"{digest(*call)}.graph"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(export()))
    return pickle.loads(path.read_bytes())


ORIGIN = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")


def settled(config: Any) -> Any:
    """A config without the fields that tell a saved model from the same model in memory."""
    if isinstance(config, dict):
        return {name: settled(value) for name, value in sorted(config.items(), key=str) if name not in ORIGIN}
    return config


def digest(module: torch.nn.Module, *arguments: Any) -> str:
    """A digest of a module's code, configs, weights and buffers, and of the other arguments."""
    state = hashlib.sha256(repr((type(module), module, arguments)).encode())
    for name, part in module.named_modules():
        if hasattr(part, "config"):
            state.update(f"{name} {settled(part.config.to_dict())}".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(
            tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode()
        )
    return state.hexdigest()
