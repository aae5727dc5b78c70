"""Cleans an exported graph: every weight is stored once, and no doc string or metadata contains paths of this machine."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

PRODUCTS = ("MatMul", "Gemm")  # these read a transposed matrix as fast as the matrix


@dataclass(frozen=True, slots=True)
class Content:
    """Identifies the values of a weight. A matrix and its transpose have the same `key` and differ in `flipped`."""

    key: str
    flipped: bool = False


def clean_graph(model: onnx.ModelProto) -> None:
    """Cleans `model` in place; its results stay the same.

    Of weights with equal content one is kept. Of a matrix and its transpose one is kept too, with a Transpose for the nodes
    that need the other: a matrix from which rows are looked up is kept as it is, and products get the Transpose. Unused
    weights are removed, and all doc strings and metadata, in which the exporter leaves source paths.
    """
    graph = model.graph
    overridable = {port.name for port in graph.input}  # an initializer that is also an input is only its default
    fixed = overridable | {port.name for inner in graphs(graph) for port in inner.output}
    keep_weights(graph, fixed | set(readers_of(graph)))
    readers = readers_of(graph)
    replacements: dict[str, str] = {}
    transposed: dict[str, str] = {}
    for group in equal_weights(weight for weight in graph.initializer if weight.name not in overridable):
        kept, content = min(group, key=lambda pair: only_products(readers.get(pair[0].name, ())))
        for weight, other in group:
            if weight is not kept and weight.name not in fixed:
                if content != other:
                    transposed[kept.name] = f"{kept.name}_transposed"
                replacements[weight.name] = kept.name if content == other else transposed[kept.name]
    rename_inputs(graph, replacements)
    prepend(graph, transposes(transposed))
    keep_weights(graph, fixed | set(readers_of(graph)))
    strip(model)


def equal_weights(weights: Iterable[onnx.TensorProto]) -> list[list[tuple[onnx.TensorProto, Content]]]:
    """Groups of two or more weights with equal or transposed content, in their order."""
    groups: dict[str, list[tuple[onnx.TensorProto, Content]]] = defaultdict(list)
    for weight in weights:
        content = content_of(weight)
        groups[content.key].append((weight, content))
    return [group for group in groups.values() if len(group) > 1]


def content_of(weight: onnx.TensorProto) -> Content:
    """Equal for tensors of equal type, shape and bytes. External data is identified by its location and not read."""
    kind = f"{weight.data_type} {list(weight.dims)}"
    if weight.data_location == TensorProto.EXTERNAL:
        location = sorted((entry.key, entry.value) for entry in weight.external_data)
        return Content(f"{kind} at {location}")
    if weight.data_type == TensorProto.STRING:
        return Content(f"{kind} {list(weight.string_data)}")
    values = numpy_helper.to_array(weight)
    digest = digest_of(weight.data_type, values)
    if values.ndim != 2:
        return Content(digest)
    flipped = digest_of(weight.data_type, values.T)
    return Content(min(digest, flipped), flipped=flipped < digest)


def digest_of(kind: int, values: np.ndarray) -> str:
    digest = hashlib.sha256(f"{kind} {values.shape}".encode())
    digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes: branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """The types of the operators that read each value, in branches and loops too."""
    readers: dict[str, list[str]] = {}
    for inner in graphs(graph):
        for node in inner.node:
            for name in node.input:
                readers.setdefault(name, []).append(node.op_type)
    return readers


def only_products(readers: Sequence[str]) -> bool:
    return all(kind in PRODUCTS for kind in readers)


def transposes(outputs: Mapping[str, str]) -> list[onnx.NodeProto]:
    """A Transpose for each matrix, with the name of its output."""
    return [
        helper.make_node("Transpose", [name], [output], name=f"node_{output}", perm=[1, 0])
        for name, output in outputs.items()
    ]


def prepend(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    later = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *later])


def rename_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for inner in graphs(graph):
        for node in inner.node:
            for number, name in enumerate(node.input):
                node.input[number] = names.get(name, name)


def keep_weights(graph: onnx.GraphProto, used: set[str]) -> None:
    """Removes all weights but those in `used`, with their shape information."""
    unused = {weight.name for weight in graph.initializer} - used
    for values in (graph.initializer, graph.value_info):
        for number in reversed(range(len(values))):  # in place: weights may be gigabytes
            if values[number].name in unused:
                del values[number]


def strip(message: Any) -> None:
    """Removes doc strings and metadata from a protobuf message and everything in it."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "DESCRIPTOR") else value:
                strip(part)
