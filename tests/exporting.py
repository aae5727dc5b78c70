"""Random captioners' graphs, exported once for all tests: an export takes seconds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
import torch
from captioners import HALF, SIZE, random_captioner

from capcli.engine import Memory
from capcli.export.graphs import encode_graph, step_graph
from capcli.models.attention import use_attention
from capcli.models.vision_encoder_decoder import Encode, Step


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
def exported(decoder: str, profile: Any) -> Exported:
    model = random_captioner("vit", decoder, seed=5)
    own = copy.deepcopy(model)
    encode, step = Encode(own, 1 / 255, HALF, HALF).eval(), Step(own).eval()
    first, memory = encode_graph(encode, (SIZE, SIZE), profile)
    second = step_graph(step, memory, torch.float32, profile)
    use_attention(own.decoder)
    return Exported(model, encode, step, first, second, memory)
