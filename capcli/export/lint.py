"""What an exported graph should not have: weights that are stored more than once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

STRING = onnx.TensorProto.STRING
EXTERNAL = onnx.TensorProto.EXTERNAL


@dataclass(frozen=True, slots=True)
class Content:
    """What a weight holds. A matrix and its transpose have one `key`, and differ in `flipped`."""

    key: str
    flipped: bool = False


def duplicate_weights(model: onnx.ModelProto) -> list[str]:
    """A line for each weight whose content, or the transpose of it, is stored under another name already."""
    first: dict[str, tuple[str, Content]] = {}
    lines = []
    for graph in graphs(model.graph):
        for weight in graph.initializer:
            held = content(weight)
            name, earlier = first.setdefault(held.key, (weight.name, held))
            if name != weight.name:
                how = "is equal to" if held == earlier else "is the transpose of"
                lines.append(f"{weight.name} {list(weight.dims)} {how} {name}")
    return lines


def alike(weights: Iterable[onnx.TensorProto]) -> list[list[tuple[onnx.TensorProto, Content]]]:
    """The weights of equal content or transposed content, two or more together, in their order."""
    groups: dict[str, list[tuple[onnx.TensorProto, Content]]] = defaultdict(list)
    for weight in weights:
        held = content(weight)
        groups[held.key].append((weight, held))
    return [group for group in groups.values() if len(group) > 1]


def content(weight: onnx.TensorProto) -> Content:
    """Equal for tensors of equal type, shape and bytes; external data is told apart by its place, and not read."""
    kind = f"{weight.data_type} {list(weight.dims)}"
    if weight.data_location == EXTERNAL:
        place = sorted((entry.key, entry.value) for entry in weight.external_data)
        return Content(f"{kind} at {place}")
    if weight.data_type == STRING:
        return Content(f"{kind} {list(weight.string_data)}")
    values = numpy_helper.to_array(weight)
    own = digest(weight.data_type, values)
    if values.ndim != 2:
        return Content(own)
    turned = digest(weight.data_type, values.T)
    return Content(min(own, turned), flipped=turned < own)


def digest(kind: int, values: np.ndarray) -> str:
    whole = hashlib.sha256(f"{kind} {values.shape}".encode())
    whole.update(np.ascontiguousarray(values).tobytes())
    return whole.hexdigest()


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes: branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)
