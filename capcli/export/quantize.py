"""int8 for CPUs: weights of matrix products in 8 bits, a scale per block of a column; activations rounded likewise, row by row.

ONNX Runtime's MatMulNBits. Its dynamic quantization (MatMulInteger) has one scale for all rows of a batch, so that a caption
would depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx

BLOCK = 16  # weights that share a scale
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: products in int8, sums in int32


def quantize(graph: onnx.ModelProto, vocabulary: int | None = None) -> onnx.ModelProto:
    """The graph with its constant matrices in 8 bits. What is looked up in (embeddings) stays as it is.

    In a step, which says words of a `vocabulary`, so does what chooses them, and so do matrices that narrow: what these
    multiply words captions differently when it has 8 bits (BENCHMARKS.md).
    """
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        whole = ONNXModel(graph)
        whole.replace_gemm_with_matmul()
        made = MatMulNBitsQuantizer(
            whole.model,
            bits=8,
            block_size=BLOCK,
            is_symmetric=False,
            accuracy_level=INT8_ACTIVATIONS,
            nodes_to_exclude=[] if vocabulary is None else exact_products(whole.model.graph, vocabulary),
        )
        made.process()
    quantized: onnx.ModelProto = made.model.model
    return quantized


def exact_products(graph: onnx.GraphProto, vocabulary: int) -> list[str]:
    """By name: the products by matrices of `vocabulary` columns, or of fewer columns than rows."""
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer if len(weight.dims) == 2}
    products = [
        (node.name, *sizes[node.input[1]]) for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes
    ]
    return [name for name, rows, columns in products if columns == vocabulary or columns < rows]


@contextmanager
def quiet() -> Iterator[None]:
    """The library tells of every matrix, and once imported makes all libraries tell."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        root.setLevel(level)
        for handler in [each for each in root.handlers if each not in handlers]:
            root.removeHandler(handler)
