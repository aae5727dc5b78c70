"""Tidies an exported graph: every weight is stored once, and nothing in it tells of the machine it was made on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from capcli.export.lint import Content, alike, graphs

PRODUCTS = ("MatMul", "Gemm")  # what reads a transposed matrix as fast as a matrix


def share_weights(model: onnx.ModelProto) -> None:
    """Tidies `model` in place, which computes the same before and after.

    Weights of equal content become one; of a matrix and its transpose one is left, with a Transpose in front of those that
    want the other: what looks up rows keeps the matrix as it is, and a product gets the Transpose. Weights that nothing uses
    go. So do doc strings and metadata everywhere, in which the exporter leaves source paths.
    """
    graph = model.graph
    overridable = {given.name for given in graph.input}  # an initializer that is an input too is only its default
    bound = overridable | {value.name for each in graphs(graph) for value in each.output}
    keep(graph, bound | set(read_by(graph)))
    readers = read_by(graph)
    renamed: dict[str, str] = {}
    turned: dict[str, str] = {}
    for group in alike(weight for weight in graph.initializer if weight.name not in overridable):
        keeper, held = min(group, key=lambda each: only_products(readers.get(each[0].name, ())))
        for weight, other in group:
            if weight is not keeper and weight.name not in bound:
                renamed[weight.name] = serving(keeper, held, other, turned)
    rename_inputs(graph, renamed)
    put_first(graph, list(transposes(turned)))
    keep(graph, bound | set(read_by(graph)))
    strip(model)


def serving(keeper: onnx.TensorProto, held: Content, other: Content, turned: dict[str, str]) -> str:
    """The name under which `keeper` serves in place of a weight like it; notes in `turned` that it is transposed."""
    if held == other:
        return keeper.name
    return turned.setdefault(keeper.name, f"{keeper.name}_transposed")


def transposes(turned: Mapping[str, str]) -> Iterator[onnx.NodeProto]:
    for name, output in turned.items():
        yield helper.make_node("Transpose", [name], [output], name=f"node_{output}", perm=[1, 0])


def put_first(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    later = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *later])


def read_by(graph: onnx.GraphProto) -> dict[str, list[str]]:
    """The kinds of operators that read each value, those inside branches and loops too."""
    readers: dict[str, list[str]] = {}
    for each in graphs(graph):
        for node in each.node:
            for name in node.input:
                readers.setdefault(name, []).append(node.op_type)
    return readers


def only_products(readers: Sequence[str]) -> bool:
    return all(kind in PRODUCTS for kind in readers)


def rename_inputs(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    for each in graphs(graph):
        for node in each.node:
            for number, name in enumerate(node.input):
                node.input[number] = renamed.get(name, name)


def keep(graph: onnx.GraphProto, used: set[str]) -> None:
    """Removes all other weights, and what is said of their shapes."""
    gone = {weight.name for weight in graph.initializer} - used
    for values in (graph.initializer, graph.value_info):
        for number in reversed(range(len(values))):  # in place: weights may be gigabytes
            if values[number].name in gone:
                del values[number]


def strip(message: Any) -> None:
    """Removes doc strings and metadata from a model, or a part of one, and from all its parts."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in [value] if hasattr(value, "DESCRIPTOR") else value:
                strip(each)
