"""Exported graphs: valid, with the types and names that runtimes need, and every weight stored once."""

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
from exporting import KINDS, SHARED, cached_graphs, duplicate_weights
from onnx import TensorProto, helper, numpy_helper
from running import VOCABULARY
from transformers.pytorch_utils import Conv1D

from capcli.export import graphs
from capcli.export.cleanup import clean_graph
from capcli.models.vision_encoder_decoder import Encode, Step

INPUTS = {"pixels": "UINT8", "tokens": "INT32", "position": "INT32", "at": "INT32", "visible": "BOOL"}
AXES = {
    "pixels": ["chunk", SIZE, SIZE, 3],
    "tokens": ["slots", "rows"],
    "position": ["slots", "rows"],
    "at": ["slots"],
    "visible": ["slots", "rows", "entries"],
}
# Every encoder, and each decoder with each profile, with a head of its own and with one that is the embedding. The first three
# are those of other tests, whose graphs are exported once for all.
CAPTIONERS = {
    "vit-gpt2-untied-fused": (KINDS["fused"] | {"vocabulary": VOCABULARY}, "fused"),
    "swinv2-bert-untied-portable": (KINDS["portable"] | {"vocabulary": VOCABULARY}, "portable"),
    "deit-bert-tied-fused": (SHARED["bert"], "fused"),
    "beit-gpt2-tied-portable": (
        {"encoder": "beit", "decoder": "gpt2", "n_layer": 1, "tie_word_embeddings": True},
        "portable",
    ),
    "swin-fused": ({"encoder": "swin"}, "fused"),  # without a decoder
}


@dataclass
class Exported:
    """A captioner's graphs by name as the exporter gives them (`raw`) and cleaned, and how they were exported."""

    profile: str
    tied: bool
    raw: dict[str, onnx.ModelProto]
    cleaned: dict[str, onnx.ModelProto]


@pytest.fixture(scope="module", params=CAPTIONERS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    shape, profile = CAPTIONERS[request.param]
    captioner = copy.deepcopy(random_captioner(**shape))
    with cached_graphs(tmp_path_factory):
        graph, memory = graphs.encode_graph(Encode(captioner, 1 / 255, HALF, HALF).eval(), (SIZE, SIZE), profile)
        raw = {"encode": graph}
        if "decoder" in shape:
            raw["step"] = graphs.step_graph(Step(captioner).eval(), memory, torch.float32, profile)
    cleaned = copy.deepcopy(raw)
    for graph in cleaned.values():
        clean_graph(graph)
    return Exported(profile, "tied" in request.param.split("-"), raw, cleaned)


def kind_of(value: onnx.ValueInfoProto) -> str:
    return str(TensorProto.DataType.Name(value.type.tensor_type.elem_type))


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.slow
def test_onnx_accepts_the_graphs_and_infers_their_shapes(exported: Exported) -> None:
    for graph in exported.cleaned.values():
        onnx.checker.check_model(graph, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
        assert [shape_of(value) for value in inferred.graph.output] == [shape_of(v) for v in graph.graph.output]


def test_graphs_have_the_opset_of_their_profile_and_no_other_domain(exported: Exported) -> None:
    assert graphs.OPSET == {"fused": 24, "portable": 18}
    for graph in exported.cleaned.values():
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", graphs.OPSET[exported.profile])]
        assert not graph.functions
        assert {node.domain for node in graph.graph.node} == {""}


def test_the_fused_step_has_one_operator_for_each_write_and_each_attention_and_portable_graphs_have_none(
    exported: Exported,
) -> None:
    for name, graph in exported.cleaned.items():
        kinds = [node.op_type for node in graph.graph.node]
        if exported.profile == "portable":
            assert not {"TensorScatter", "Attention"} & set(kinds)
        elif name == "step":
            pools = sum(value.name.startswith("pool_") for value in graph.graph.input)
            assert (
                kinds.count("TensorScatter") == kinds.count("Attention") == pools > 0
            )  # self and cross; keys and values


def test_a_linear_layer_multiplies_without_flattening(exported: Exported) -> None:
    """It is one MatMul without Reshapes around it."""
    for graph in exported.cleaned.values():
        assert "Gemm" not in {node.op_type for node in graph.graph.node}


def test_inputs_and_outputs_have_the_types_of_the_runtimes(exported: Exported) -> None:
    for name, graph in exported.cleaned.items():
        kinds = {value.name: kind_of(value) for value in graph.graph.input}
        first = ["pixels"] if name == "encode" else ["tokens", "position", "at", "visible"]
        assert list(kinds)[: len(first)] == first
        assert {n: kinds.pop(n) for n in first} == {n: INPUTS[n] for n in first}
        assert all(n.startswith(("memory_", "pool_")) and kind == "FLOAT" for n, kind in kinds.items())
        assert {kind_of(value) for value in graph.graph.output} == {"FLOAT"}


def test_dynamic_axes_have_their_names_and_others_are_fixed(exported: Exported) -> None:
    for name, graph in exported.cleaned.items():
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


def test_a_step_takes_the_memory_of_encode_and_gives_back_its_pool(exported: Exported) -> None:
    left = [value.name for value in exported.cleaned["encode"].graph.output]
    assert left == [f"memory_{kind}{layer}" for layer in range(len(left) // 2) for kind in "kv"]
    if "step" in exported.cleaned:
        step = exported.cleaned["step"].graph
        assert [v.name for v in step.input][4:] == left + [name.replace("memory", "pool") for name in left]
        assert [v.name for v in step.output] == ["logits", *(name.replace("memory", "pool_out") for name in left)]


def test_every_weight_is_stored_once(exported: Exported) -> None:
    for graph in exported.cleaned.values():
        assert duplicate_weights(graph) == []
        read = {name for node in graph.graph.node for name in node.input}
        assert {weight.name for weight in graph.graph.initializer} <= read


def test_a_head_that_is_the_embedding_is_one_weight(exported: Exported) -> None:
    if "step" in exported.cleaned:
        step = exported.cleaned["step"].graph
        vocabulary = shape_of(step.output[0])[2]
        tables = [weight for weight in step.initializer if len(weight.dims) == 2 and vocabulary in weight.dims]
        assert len(tables) == (1 if exported.tied else 2)


def test_graphs_contain_no_paths_of_this_machine(exported: Exported) -> None:
    here = [str(Path(__file__).parents[1]), str(Path.home()), sys.prefix, *(p for p in sys.path if len(p) > 4)]
    for raw, graph in zip(exported.raw.values(), exported.cleaned.values(), strict=True):
        stored = graph.SerializeToString()
        assert any(path.encode() in raw.SerializeToString() for path in here)
        assert not [path for path in here if path.encode() in stored]
        assert b"doc_string" not in stored
        assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_cleaned_graphs_compute_the_same(exported: Exported) -> None:
    for raw, graph in zip(exported.raw.values(), exported.cleaned.values(), strict=True):
        inputs = dict(some_inputs(graph))
        for before, after in zip(run(raw, inputs), run(graph, inputs), strict=True):
            np.testing.assert_array_equal(before, after)


def some_inputs(model: onnx.ModelProto) -> Iterator[tuple[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    sizes = {"slots": 2, "rows": 3, "entries": 6, "chunk": 2}
    for value in model.graph.input:
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in shape_of(value)]
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        high = {"pixels": 256, "tokens": 100, "at": 4}.get(value.name, 3)
        integer = np.issubdtype(kind, np.integer)
        yield value.name, (draw.integers(0, high, shape) if integer else draw.standard_normal(shape) > 0).astype(kind)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


# Cleaning, on graphs made by hand


def model_of(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], outputs: list[str], **more: object
) -> onnx.ModelProto:
    """rows int64 [2] and x float [2, 4] in; `outputs`, matrices, out."""
    inputs = [
        helper.make_tensor_value_info("rows", TensorProto.INT64, [2]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4]),
    ]
    stored = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in outputs]
    graph = helper.make_graph(nodes, "example", inputs, results, stored, **more)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


EXAMPLE = {"rows": np.array([3, 1]), "x": np.arange(8, dtype=np.float32).reshape(2, 4)}
TABLE = np.arange(20, dtype=np.float32).reshape(5, 4)


def names(model: onnx.ModelProto) -> list[str]:
    return [weight.name for weight in model.graph.initializer]


def cleaned(model: onnx.ModelProto) -> onnx.ModelProto:
    """A cleaned copy, which is valid and computes the same."""
    after = copy.deepcopy(model)
    clean_graph(after)
    onnx.checker.check_model(after, full_check=True)
    for old, new in zip(run(model, EXAMPLE), run(after, EXAMPLE), strict=True):
        np.testing.assert_array_equal(old, new)
    again = copy.deepcopy(after)
    clean_graph(again)
    assert again == after
    return after


def test_an_embedding_is_kept_as_it_is_and_its_product_gets_a_transpose() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "head"], ["logits"]),
        helper.make_node("Gather", ["table", "rows"], ["embedded"]),
    ]
    model = model_of(nodes, {"head": TABLE.T.copy(), "table": TABLE}, ["logits", "embedded"])
    assert duplicate_weights(model) == ["table [5, 4] is the transpose of head"]
    after = cleaned(model)
    assert names(after) == ["table"]
    assert [(node.op_type, list(node.input)) for node in after.graph.node] == [
        ("Transpose", ["table"]),
        ("MatMul", ["x", "table_transposed"]),
        ("Gather", ["table", "rows"]),
    ]


def test_equal_weights_become_one_and_unused_ones_are_removed() -> None:
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
    after = cleaned(model)
    assert names(after) == ["a"]
    assert not after.graph.value_info
    assert [node.op_type for node in after.graph.node] == ["Transpose", "MatMul", "MatMul", "Gemm"]


def test_weights_of_other_types_or_shapes_are_not_merged() -> None:
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
    assert names(cleaned(model)) == list(weights)


def test_weights_of_branches_are_shared_and_outputs_keep_their_names() -> None:
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
    after = cleaned(model)
    assert names(after) == ["a", "given", "flag"]
    assert duplicate_weights(after) == ["given [1, 4] is equal to a"]  # it is an output, whose name must stay


def test_doc_strings_and_metadata_are_removed_everywhere() -> None:
    model = model_of([helper.make_node("Add", ["x", "a"], ["y"])], {"a": np.ones(4, np.float32)}, ["y"])
    parts = [model, model.graph, model.graph.node[0], model.graph.input[1], model.graph.initializer[0]]
    for part in parts:
        part.doc_string = "/home/someone/secret.py"
        entry = part.metadata_props.add()
        entry.key, entry.value = "source", "/home/someone/secret.py"
    after = cleaned(model)
    assert b"secret" not in after.SerializeToString()


def test_weights_in_files_are_identified_by_their_location(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", name], [f"y_{name}"]) for name in "abc"]
    rows = {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 4), np.float32), "c": np.zeros((2, 4), np.float32)}
    model = model_of(nodes, rows, ["y_a", "y_b", "y_c"])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    clean_graph(stored)
    assert names(stored) == ["a", "b", "c"]  # each is at an offset of its own
    for weight in stored.graph.initializer:
        del weight.external_data[1:]
    clean_graph(stored)
    assert names(stored) == ["a"]


def test_the_export_restores_the_method_that_it_patches() -> None:
    before = Conv1D.forward
    with graphs.linear_without_flattening():
        assert Conv1D.forward is not before
    assert Conv1D.forward is before
