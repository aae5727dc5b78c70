"""Exported graphs: valid, typed and named as the runtimes need them, and every weight stored once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from captioners import HALF, SIZE, random_captioner
from onnx import TensorProto, helper, numpy_helper

from capcli.export.graphs import OPSET, encode_graph, step_graph
from capcli.export.lint import duplicate_weights
from capcli.export.tidy import share_weights
from capcli.models.vision_encoder_decoder import Encode, Step

INPUTS = {"pixels": "UINT8", "tokens": "INT32", "position": "INT32", "at": "INT32", "visible": "BOOL"}
AXES = {
    "pixels": ["chunk", SIZE, SIZE, 3],
    "tokens": ["slots", "rows"],
    "position": ["slots", "rows"],
    "at": ["slots"],
    "visible": ["slots", "rows", "entries"],
}
# Every encoder, and both decoders with a head of their own and with one that is the embedding, in both profiles.
CAPTIONERS = [
    ("vit", "gpt2", "tied", "fused"),
    ("deit", "bert", "untied", "fused"),
    ("beit", "gpt2", "untied", "portable"),
    ("swin", "bert", "tied", "portable"),
    ("swinv2", None, "untied", "fused"),
]


@dataclass
class Exported:
    """A captioner's graphs by name as the exporter leaves them (`raw`) and tidied, and how they were asked for."""

    profile: str
    tied: bool
    raw: dict[str, onnx.ModelProto]
    tidy: dict[str, onnx.ModelProto]


@pytest.fixture(scope="module", params=CAPTIONERS, ids=lambda shape: "-".join(map(str, shape)))
def exported(request: pytest.FixtureRequest) -> Exported:
    encoder, decoder, head, profile = request.param
    captioner = copy.deepcopy(random_captioner(encoder, decoder or "gpt2", tie_word_embeddings=head == "tied"))
    if decoder == "gpt2":  # one of its layers shows as much as three, and takes a third of the time
        del captioner.decoder.transformer.h[1:]
    graph, memory = encode_graph(Encode(captioner, 1 / 255, HALF, HALF).eval(), (SIZE, SIZE), profile)
    raw = {"encode": graph}
    if decoder is not None:
        raw["step"] = step_graph(Step(captioner).eval(), memory, torch.float32, profile)
    tidy = copy.deepcopy(raw)
    for graph in tidy.values():
        share_weights(graph)
    return Exported(profile, head == "tied", raw, tidy)


def kind_of(value: onnx.ValueInfoProto) -> str:
    return str(TensorProto.DataType.Name(value.type.tensor_type.elem_type))


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


def test_onnx_finds_graphs_valid_and_their_shapes_sound(exported: Exported) -> None:
    for graph in exported.tidy.values():
        onnx.checker.check_model(graph, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
        assert [shape_of(value) for value in inferred.graph.output] == [shape_of(v) for v in graph.graph.output]


def test_graphs_are_of_the_profiles_opset_and_of_no_other_domain(exported: Exported) -> None:
    assert OPSET == {"fused": 24, "portable": 18}
    for graph in exported.tidy.values():
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET[exported.profile])]
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} == {""}


def test_the_fused_step_has_one_operator_for_each_write_and_each_attention_and_portable_graphs_have_none(
    exported: Exported,
) -> None:
    for name, graph in exported.tidy.items():
        kinds = [node.op_type for node in graph.graph.node]
        if exported.profile == "portable":
            assert not {"TensorScatter", "Attention"} & set(kinds)
        elif name == "step":
            pools = sum(value.name.startswith("pool_") for value in graph.graph.input)
            assert (
                kinds.count("TensorScatter") == kinds.count("Attention") == pools > 0
            )  # self and cross; keys and values


def test_a_linear_layer_multiplies_tokens_as_they_lie(exported: Exported) -> None:
    """One product and nothing that makes two dimensions of three and three of two around it."""
    for graph in exported.tidy.values():
        assert "Gemm" not in {node.op_type for node in graph.graph.node}


def test_inputs_are_small_integers_and_booleans_besides_the_tensors(exported: Exported) -> None:
    for name, graph in exported.tidy.items():
        kinds = {value.name: kind_of(value) for value in graph.graph.input}
        own = ["pixels"] if name == "encode" else ["tokens", "position", "at", "visible"]
        assert list(kinds)[: len(own)] == own
        assert {n: kinds.pop(n) for n in own} == {n: INPUTS[n] for n in own}
        assert all(n.startswith(("memory_", "pool_")) and kind == "FLOAT" for n, kind in kinds.items())
        assert {kind_of(value) for value in graph.graph.output} == {"FLOAT"}


def test_axes_that_vary_have_their_names_and_no_other_varies(exported: Exported) -> None:
    for name, graph in exported.tidy.items():
        first = "chunk" if name == "encode" else "slots"
        for value in (*graph.graph.input, *graph.graph.output):
            shape = shape_of(value)
            if value.name in AXES:
                assert shape == AXES[value.name]
            elif value.name == "logits":
                assert shape[:2] == ["slots", "rows"]
                assert isinstance(shape[2], int)
            else:
                assert shape[0] == first
                assert shape[2] == "entries" if value.name.startswith("pool_") else isinstance(shape[2], int)
                assert isinstance(shape[1], int)
                assert isinstance(shape[3], int)


def test_what_goes_in_as_a_pool_comes_out_as_one_and_memory_is_what_encode_leaves(exported: Exported) -> None:
    left = [value.name for value in exported.tidy["encode"].graph.output]
    assert left == [f"memory_{kind}{layer}" for layer in range(len(left) // 2) for kind in "kv"]
    if "step" in exported.tidy:
        step = exported.tidy["step"].graph
        assert [v.name for v in step.input][4:] == left + [name.replace("memory", "pool") for name in left]
        assert [v.name for v in step.output] == ["logits", *(name.replace("memory", "pool_out") for name in left)]


def test_every_weight_is_stored_once(exported: Exported) -> None:
    for graph in exported.tidy.values():
        assert duplicate_weights(graph) == []
        read = {name for node in graph.graph.node for name in node.input}
        assert {weight.name for weight in graph.graph.initializer} <= read


def test_a_head_that_is_the_embedding_is_one_weight(exported: Exported) -> None:
    if "step" in exported.tidy:
        step = exported.tidy["step"].graph
        vocabulary = shape_of(step.output[0])[2]
        tables = [weight for weight in step.initializer if len(weight.dims) == 2 and vocabulary in weight.dims]
        assert len(tables) == (1 if exported.tied else 2)


def test_graphs_tell_nothing_of_the_machine(exported: Exported) -> None:
    here = [str(Path(__file__).parents[1]), str(Path.home()), sys.prefix, *(p for p in sys.path if len(p) > 4)]
    for raw, graph in zip(exported.raw.values(), exported.tidy.values(), strict=True):
        stored = graph.SerializeToString()
        assert any(path.encode() in raw.SerializeToString() for path in here)
        assert not [path for path in here if path.encode() in stored]
        assert b"doc_string" not in stored
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_tidied_graphs_compute_the_same(exported: Exported) -> None:
    for raw, graph in zip(exported.raw.values(), exported.tidy.values(), strict=True):
        given = dict(some_inputs(graph))
        for before, after in zip(run(raw, given), run(graph, given), strict=True):
            np.testing.assert_array_equal(before, after)


def some_inputs(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    sizes = {"slots": 2, "rows": 3, "entries": 6, "chunk": 2}
    for value in model.graph.input:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in shape_of(value)]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        high = {"pixels": 256, "tokens": 100, "at": 4}.get(value.name, 3)
        whole = np.issubdtype(kind, np.integer)
        yield value.name, (draw.integers(0, high, shape) if whole else draw.standard_normal(shape) > 0).astype(kind)


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answered: list[np.ndarray] = session.run(None, given)
    return answered


# Tidying, on graphs made by hand


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: list[str], **more: object
) -> onnx.ModelProto:
    """rows int64 [2] and x float [2, 4] in; `outputs`, matrices, out."""
    given = [
        helper.make_tensor_value_info("rows", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
    ]
    stored = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    left = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in outputs]
    graph = helper.make_graph(nodes, "made", given, left, stored, **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


GIVEN = {"rows": np.array([3, 1]), "x": np.arange(8, dtype=np.float32).reshape(2, 4)}
TABLE = np.arange(20, dtype=np.float32).reshape(5, 4)


def names(model: onnx.ModelProto) -> list[str]:
    return [weight.name for weight in model.graph.initializer]


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A tidied copy, which is valid and computes the same."""
    after = copy.deepcopy(model)
    share_weights(after)
    onnx.checker.check_model(after, full_check=True)
    for old, new in zip(run(model, GIVEN), run(after, GIVEN), strict=True):
        np.testing.assert_array_equal(old, new)
    again = copy.deepcopy(after)
    share_weights(again)
    assert again == after
    return after


def test_a_table_is_kept_as_rows_are_looked_up_in_it_whichever_comes_first() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        helper.make_node("Gather", ["table", "rows"], ["seen"]),
    ]
    model = model_of(nodes, {"head": TABLE.T.copy(), "table": TABLE}, ["logits", "seen"])
    assert duplicate_weights(model) == ["table [5, 4] is the transpose of head"]
    after = tidied(model)
    assert names(after) == ["table"]
    assert [(node.op_type, list(node.input)) for node in after.graph.node] == [
        ("Transpose", ["table"]),
        ("MatMul", ["x", "table_transposed"]),
        ("Gather", ["table", "rows"]),
    ]


def test_equal_weights_become_one_however_many_and_unused_ones_go() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("MatMul", ["p", "b"], ["q"]),
        helper.make_node("Gemm", ["q", "c"], ["r"], transB=1),
    ]
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    shared = {"a": square, "b": square.copy(), "c": square.T.copy(), "unused": square.copy(), "other": TABLE}
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in ("b", "unused")]
    model = model_of(nodes, shared, ["r"], value_info=shapes)
    assert duplicate_weights(model) == [
        "b [4, 4] is equal to a",
        "c [4, 4] is the transpose of a",
        "unused [4, 4] is equal to a",
    ]
    after = tidied(model)
    assert names(after) == ["a"]
    assert not after.graph.value_info
    assert [node.op_type for node in after.graph.node] == ["Transpose", "MatMul", "MatMul", "Gemm"]


def test_weights_that_only_look_alike_stay() -> None:
    zeros = np.zeros((4, 4), np.float32)
    nodes = [
        helper.make_node("Add", ["x", "row"], ["p"]),
        helper.make_node("Add", ["p", "rows_of_one"], ["q"]),
        helper.make_node("Cast", ["whole"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["q", "zeros"], ["r"]),
        helper.make_node("MatMul", ["r", "w"], ["s"]),
    ]
    weights = {
        "row": np.zeros(4, np.float32),
        "rows_of_one": np.zeros((1, 4), np.float32),
        "zeros": zeros,
        "whole": zeros.view(np.int32),
    }
    model = model_of(nodes, weights, ["s"])
    assert duplicate_weights(model) == []
    assert names(tidied(model)) == list(weights)


def test_weights_in_branches_and_outputs_keep_their_meaning() -> None:
    flag = numpy_helper.from_array(np.array(True), "flag")
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x", "b"], [f"{kind}_out"])],
            kind,
            [],
            [helper.make_tensor_value_info(f"{kind}_out", TensorProto.FLOAT, [None, None])],
        )
        for kind in ("Add", "Sub")
    ]
    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Add", ["y", "a"], ["z"]),
    ]
    row = np.arange(4, dtype=np.float32)[None]
    model = model_of(nodes, {"a": row, "b": row.copy(), "given": row.copy()}, ["z", "given"])
    model.graph.initializer.append(flag)
    after = tidied(model)
    assert names(after) == ["a", "given", "flag"]
    assert duplicate_weights(after) == ["given [1, 4] is equal to a"]  # it is an output: its name must stay


def test_doc_strings_and_metadata_go_from_every_part() -> None:
    model = model_of([helper.make_node("Add", ["x", "a"], ["y"])], {"a": np.ones(4, np.float32)}, ["y"])
    parts = [model, model.graph, model.graph.node[0], model.graph.input[1], model.graph.initializer[0]]
    for part in parts:
        part.doc_string = "/home/someone/secret.py"
        entry = part.metadata_props.add()
        entry.key, entry.value = "source", "/home/someone/secret.py"
    after = tidied(model)
    assert b"secret" not in after.SerializeToString()


def test_weights_in_files_are_told_apart_by_their_place(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", name], [f"y_{name}"]) for name in "abc"]
    rows = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32), "c": np.zeros((2, 4), np.float32)}
    model = model_of(nodes, rows, ["y_a", "y_b", "y_c"])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    apart = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert duplicate_weights(apart) == []  # each is at an offset of its own
    for weight in apart.graph.initializer:
        del weight.external_data[1:]
    assert duplicate_weights(apart) == ["b [2, 4] is equal to a", "c [2, 4] is equal to a"]
