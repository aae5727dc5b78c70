"""int8 for CPUs: weights of matrix products in 8 bits, with a scale per block of a column; activations are rounded per row.

It uses ONNX Runtime's MatMulNBits. ONNX Runtime's dynamic quantization (MatMulInteger) has one scale for all rows of a batch,
so a caption would depend on the other images in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx

BLOCK = 16  # weights that share a scale
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy level: products in int8, sums in int32


def quantize(graph: onnx.ModelProto, vocabulary: int | None = None) -> onnx.ModelProto:
    """The graph with its constant matrices in 8 bits. Embeddings, from which rows are looked up, stay as they are.

    `vocabulary` is the number of a step's logits; None for encode. In a step the matrix of the logits and those with fewer
    columns than rows stay as they are: in 8 bits they change captions (BENCHMARKS.md).
    """
    with quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
        from onnxruntime.quantization.onnx_model import ONNXModel

        model = ONNXModel(graph)
        model.replace_gemm_with_matmul()
        quantizer = MatMulNBitsQuantizer(
            model.model,
            bits=8,
            block_size=BLOCK,
            is_symmetric=False,
            accuracy_level=INT8_ACTIVATIONS,
            nodes_to_exclude=[] if vocabulary is None else exact_products(model.model.graph, vocabulary),
        )
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def exact_products(graph: onnx.GraphProto, vocabulary: int) -> list[str]:
    """The names of the products by matrices of `vocabulary` columns, or of fewer columns than rows."""
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer if len(weight.dims) == 2}
    products = [
        (node.name, *sizes[node.input[1]]) for node in graph.node if node.op_type == "MatMul" and node.input[1] in sizes
    ]
    return [name for name, rows, columns in products if columns == vocabulary or columns < rows]


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the quantizer's log of every matrix; restores the root logger, which its import configures."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.setLevel(level)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
