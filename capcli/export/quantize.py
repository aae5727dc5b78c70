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


def quantize(graph: onnx.ModelProto, *, step: bool) -> onnx.ModelProto:
    """The graph with its constant matrices in 8 bits. What is looked up in (embeddings) stays as it is.

    In a `step` so do matrices that narrow: what they multiply lies apart so far that in 8 bits it words captions differently
    (BENCHMARKS.md).
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
            nodes_to_exclude=narrowing(whole.model.graph) if step else [],
        )
        made.process()
    quantized: onnx.ModelProto = made.model.model
    return quantized


def narrowing(graph: onnx.GraphProto) -> list[str]:
    """The products by matrices with fewer columns than rows, by name."""
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and len(sizes.get(node.input[1], ())) == 2]
    return [node.name for node in products if sizes[node.input[1]][0] > sizes[node.input[1]][1]]


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
