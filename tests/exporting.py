"""Random captioners' graphs, exported once for all tests: an export takes seconds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
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
    first, memory = encode_graph(encode, (SIZE, SIZE), profile)
    second = step_graph(step, memory, torch.float32, profile)
    use_attention(step.decoder)
    return Exported(model, encode, step, first, second, memory)
