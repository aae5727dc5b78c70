"""The rules of TensorRT's ONNX parser, checked on a graph without TensorRT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper

NEWEST_OPSET = 24  # of TensorRT 10.15's parser
# The operators of TensorRT 10.15's parser (onnx-tensorrt, docs/operators.md).
KNOWN = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow Cast
CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu
Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HammingWindow
HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu
Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul
Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike
RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
Squeeze Sub Sum Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
OPERATORS = frozenset(KNOWN.split())
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
DECOMPOSABLE = "TRT_decomposable"  # attribute of an Attention that may run as several kernels where none is fused


def lint(model: onnx.ModelProto) -> list[str]:
    """What TensorRT's parser would refuse or silently compute differently, a line each; empty for a graph that is ready."""
    ranks, types = ranks_of(model.graph), types_of(model.graph)
    lines = [f"opset {o.version} is newer than {NEWEST_OPSET}" for o in model.opset_import if newer(o)]
    lines += [f"{f.name}: model functions are not supported" for f in model.functions]
    for port in (*model.graph.input, *model.graph.output):
        lines += port_rules(port)
    lines += [f"{name} is float64" for name, kind in types.items() if kind == TensorProto.DOUBLE]
    for node in model.graph.node:
        name = f"{node.op_type} {node.name}".strip()
        lines += [f"{name}: {line}" for line in node_rules(node, ranks, types, model.graph)]
    return lines


def newer(opset: onnx.OperatorSetIdProto) -> bool:
    return opset.domain in ("", "ai.onnx") and opset.version > NEWEST_OPSET


def port_rules(port: onnx.ValueInfoProto) -> Iterator[str]:
    """Inputs and outputs of plans are int32, floats or uint8."""
    kind = port.type.tensor_type.elem_type
    if kind not in (*FLOATS, TensorProto.INT32, TensorProto.UINT8):
        yield f"{port.name} is {TensorProto.DataType.Name(kind).lower()}: inputs and outputs are int32, uint8 or floats"


def node_rules(
    node: onnx.NodeProto, ranks: Mapping[str, int], types: Mapping[str, int], graph: onnx.GraphProto
) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"its domain {node.domain} is not that of ONNX"
    elif node.op_type not in OPERATORS:
        yield "TensorRT does not support the operator"
    if any(types.get(name) == TensorProto.UINT8 for name in node.input) and not casts_to_float(node):
        yield "reads uint8, which TensorRT can only cast to float32 or float16"
    if casts_to(node) == TensorProto.DOUBLE:
        yield "casts to float64"
    if any(item.HasField("t") and item.t.data_type == TensorProto.DOUBLE for item in node.attribute):
        yield "has a float64 constant"
    if node.op_type.startswith("Reduce") and any(node.input[1:]) and node.input[1] not in weights_of(graph):
        yield f"its axes {node.input[1]} are computed"
    if node.op_type == "LayerNormalization" and len(node.output) > 1:
        yield "has more than one output"
    if node.op_type == "Split" and has(node, "num_outputs") and len(node.input) > 1 and node.input[1]:
        yield "gives both num_outputs and the sizes"
    if node.op_type == "Attention":
        yield from attention_rules(node, ranks)
    if node.op_type == "TensorScatter":
        yield from scatter_rules(node, ranks, graph)


def attention_rules(node: onnx.NodeProto, ranks: Mapping[str, int]) -> Iterator[str]:
    names = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
    inputs = {port: name for port, name in zip(names, node.input, strict=False) if name}
    for port in ("past_key", "past_value", "nonpad_kv_seqlen"):
        if port in inputs:
            yield f"has the input {port}"
    for port in ("Q", "K", "V", "attn_mask"):
        if port in inputs and ranks.get(inputs[port]) != 4:
            yield f"{port} is not known to be 4-D"
    if any(node.output[1:]):
        yield "has more than one output"
    for item in node.attribute:
        if item.name not in ("scale", DECOMPOSABLE):
            yield f"has the attribute {item.name}"


def scatter_rules(node: onnx.NodeProto, ranks: Mapping[str, int], graph: onnx.GraphProto) -> Iterator[str]:
    """A TensorScatter becomes a KVCacheUpdate, which works in place: the cache must be an input and an output of the graph."""
    cache, update = node.input[:2]
    if ranks.get(cache) != 4 or ranks.get(update) != 4:
        yield "cache and update are not known to be 4-D"
    if attribute(node, "axis", -2) not in (-2, 2):
        yield f"its axis is {attribute(node, 'axis', -2)}, not -2"
    if attribute(node, "mode", b"linear") != b"linear":
        yield "its mode is not linear"
    if cache not in {port.name for port in graph.input}:
        yield f"the cache {cache} is not an input of the graph"
    if node.output[0] not in {port.name for port in graph.output}:
        yield f"the result {node.output[0]} is not an output of the graph"


def has(node: onnx.NodeProto, name: str) -> bool:
    return any(item.name == name for item in node.attribute)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def casts_to(node: onnx.NodeProto) -> int | None:
    to: int | None = attribute(node, "to", None) if node.op_type == "Cast" else None
    return to


def casts_to_float(node: onnx.NodeProto) -> bool:
    return casts_to(node) in (TensorProto.FLOAT, TensorProto.FLOAT16)


def ports(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)


def types_of(graph: onnx.GraphProto) -> dict[str, int]:
    """The types of inputs, outputs, weights and the values that have shape information."""
    return {p.name: p.type.tensor_type.elem_type for p in ports(graph)} | {
        w.name: w.data_type for w in graph.initializer
    }


def ranks_of(graph: onnx.GraphProto) -> dict[str, int]:
    known = {p.name: len(p.type.tensor_type.shape.dim) for p in ports(graph) if p.type.tensor_type.HasField("shape")}
    return known | {w.name: len(w.dims) for w in graph.initializer}


def weights_of(graph: onnx.GraphProto) -> set[str]:
    return {w.name for w in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
