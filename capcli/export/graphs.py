"""A captioner's encode and step as ONNX graphs, exported from the modules that also run eagerly.

Two hooks replace operators of transformers' models: an attention function registered with transformers, and a cache layer
that writes as the profile requires. `fused` (opset 24) has one TensorScatter per pool tensor and one Attention per attention
layer; `portable` (opset 18) uses operators that older runtimes have.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import onnx
import onnxscript
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from capcli.engine.engine_json import Memory
from capcli.models.cache import Write, pool_cache
from capcli.models.modules import Encode, Step

Profile = Literal["fused", "portable"]
OPSET: dict[str, int] = {"fused": 24, "portable": 18}
NEWEST_FIRST = onnxscript.values.Opset("", 24)
# Sizes of the traced example: all different, and none 0 or 1, which torch.export specialises on.
CHUNK, SLOTS, ROWS, ENTRIES, QUESTION = 2, 3, 5, 7, 9


@torch.library.custom_op("capcli::tensor_scatter", mutates_args=())
def tensor_scatter(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """ONNX's TensorScatter (opset 24), linear along axis -2: writes `new` [S, H, Q, D] to entries at[s], at[s] + 1, ..."""
    index = (at[:, None] + torch.arange(new.shape[2], device=new.device))[:, None, :, None].long()
    return entries.scatter(2, index.expand(new.shape), new)


@tensor_scatter.register_fake
def _(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(entries)


def emit_tensor_scatter(entries: Any, new: Any, at: Any) -> Any:
    # the operator takes int64 indices only
    return NEWEST_FIRST.TensorScatter(entries, new, NEWEST_FIRST.Cast(at, to=onnx.TensorProto.INT64), axis=-2)


def write_fused(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    written: Tensor = torch.ops.capcli.tensor_scatter(entries, new, at)
    return written


def write_portable(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """The same without a scatter: a product with a matrix of zeros and ones moves `new` to its entries."""
    entry = torch.arange(entries.shape[2], device=new.device, dtype=at.dtype)
    query = torch.arange(new.shape[2], device=new.device, dtype=at.dtype)
    selected = entry[None, :, None] == (at[:, None] + query)[:, None]  # [S, N, Q]
    return torch.where(selected.any(-1)[:, None, :, None], selected[:, None].to(new.dtype) @ new, entries)


def attend_fused(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One Attention (opset 24): queries [S, H, Q, D], keys and values [S, H, N, D] -> [S, Q, H, D]."""
    out: Tensor = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling)[0]
    return out.transpose(1, 2), None


def attend_portable(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as products and a softmax: the shapes of `attend_fused`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


WRITE: dict[str, Write] = {"fused": write_fused, "portable": write_portable}
AttentionInterface.register("capcli-fused", attend_fused)
AttentionInterface.register("capcli-portable", attend_portable)


class StepGraph(nn.Module):
    """A step with the pool as input and output: a graph has no state."""

    def __init__(self, step: Step, write: Write, memory_tensors: int) -> None:
        super().__init__()
        self.step, self.write, self.memory_tensors = step, write, memory_tensors

    def forward(
        self, tokens: Tensor, position: Tensor, at: Tensor, visible: Tensor, cached: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """`cached` are the tensors of the memory, `memory_tensors` of them, and then those of the pool."""
        cache = pool_cache(cached[: self.memory_tensors], cached[self.memory_tensors :], at, self.write)
        logits = self.step.decode(tokens, position, visible, cache)
        layers: Any = cache.self_attention_cache.layers
        return (logits, *(entries for layer in layers for entries in (layer.keys, layer.values)))


def encode_graph(
    encode: Encode, size: tuple[int, int], profile: Profile, *, question: bool = False
) -> tuple[onnx.ModelProto, Memory]:
    """The graph of encode, and the shape of its output.

    pixels uint8 [E, h, w, 3], and with `question` question int32 [E, W] -> memory_k0, memory_v0, ... [E, H, M, D].
    """
    inputs: tuple[Tensor, ...] = (torch.zeros(CHUNK, *size, 3, dtype=torch.uint8),)
    axes: tuple[dict[int, str], ...] = ({0: "chunk"},)
    if question:
        inputs += (torch.zeros(CHUNK, QUESTION, dtype=torch.int32),)
        axes += ({0: "chunk", 1: "question_tokens"},)
    with torch.inference_mode():
        outputs = encode(*(x[:1] for x in inputs))
    heads, positions, head_size = outputs[0].shape[1:]
    positions -= QUESTION if question else 0
    memory = Memory(len(outputs) // 2, heads, positions, head_size, prefixed=encode.prefixed, reads_question=question)
    names = [f"memory_{name}" for name in memory.names]
    with ExitStack() as stack:
        for model in innermost_models(encode):
            stack.enter_context(attention(model, profile))
        graph = exported(encode, inputs, profile, ["pixels", "question"][: len(inputs)], names, axes)
    return graph, memory


def step_graph(step: Step, memory: Memory, dtype: torch.dtype, profile: Profile) -> onnx.ModelProto:
    """The graph of a step.

    tokens, position int32 [S, Q], at int32 [S], visible bool [S, Q, N], memory, pool -> logits [S, Q, V], pool.
    """
    names = memory.names
    # One tensor for each input: the exporter merges inputs that share a tensor.
    tokens, position = (torch.zeros(SLOTS, ROWS, dtype=torch.int32) for _ in range(2))
    at = torch.zeros(SLOTS, dtype=torch.int32)
    entries = memory.image_entries + ENTRIES
    visible = torch.ones(SLOTS, ROWS, entries, dtype=torch.bool)
    pool = [torch.zeros(SLOTS, memory.heads, entries, memory.head_size, dtype=dtype) for _ in names]
    length = memory.positions + (QUESTION if memory.reads_question else 0)
    images = [torch.zeros(SLOTS, memory.heads, length, memory.head_size, dtype=dtype) for _ in names]
    if memory.prefixed:
        images = []
    inputs = ["tokens", "position", "at", "visible"]
    inputs += [f"memory_{name}" for name in names[: len(images)]] + [f"pool_{name}" for name in names]
    image_axes = {0: "slots"} | ({2: "memory_length"} if memory.reads_question else {})
    axes = (
        {0: "slots", 1: "rows"},
        {0: "slots", 1: "rows"},
        {0: "slots"},
        {0: "slots", 1: "rows", 2: "entries"},
        [image_axes for _ in images] + [{0: "slots", 2: "entries"} for _ in names],
    )
    with attention(step.decoder, profile):
        return exported(
            StepGraph(step, WRITE[profile], len(images)),
            (tokens, position, at, visible, images + pool),
            profile,
            inputs,
            ["logits", *(f"pool_out_{name}" for name in names)],
            axes,
        )


def innermost_models(module: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers in a module that contain no other one."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    return [model for model in models if sum(isinstance(part, PreTrainedModel) for part in model.modules()) == 1]


@contextmanager
def attention(model: Any, profile: Profile) -> Iterator[None]:
    """A context in which a transformers model uses the profile's attention function, or eager if it takes none."""
    if not (model._supports_sdpa or model._supports_attention_backend):  # noqa: SLF001  (it has no attention)
        yield
        return
    before = model.config._attn_implementation  # noqa: SLF001
    chosen = f"capcli-{profile}" if getattr(model, "_supports_attention_backend", False) else "eager"
    model.set_attn_implementation(chosen)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def exported(
    module: nn.Module,
    example: tuple[Any, ...],
    profile: Profile,
    inputs: list[str],
    outputs: list[str],
    axes: tuple[Any, ...],
) -> onnx.ModelProto:
    """The ONNX graph of a module; `axes` names the dynamic dimensions of `example`, in the same nesting."""
    dimensions = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in sorted(set(axis_names(axes)))}
    with quiet_export(), linear_without_flattening(), torch.inference_mode():
        program = torch.onnx.export(
            module,
            example,
            None,
            dynamo=True,
            verbose=False,
            opset_version=OPSET[profile],
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes(axes, dimensions),
            custom_translation_table={torch.ops.capcli.tensor_scatter.default: emit_tensor_scatter},
        )
    assert program is not None
    return program.model_proto


def axis_names(axes: Any) -> Iterator[str]:
    for part in axes:
        yield from part.values() if isinstance(part, dict) else axis_names(part)


def dynamic_shapes(axes: Any, dimensions: dict[str, Any]) -> Any:
    """`axes` with torch.export's dimensions in place of their names."""
    if isinstance(axes, dict):
        return {axis: dimensions[name] for axis, name in axes.items()}
    return type(axes)(dynamic_shapes(part, dimensions) for part in axes)


@contextmanager
def linear_without_flattening() -> Iterator[None]:
    """A context in which GPT-2's linear layers multiply without flattening their input: 144 Reshapes less (BENCHMARKS.md).

    The class is patched because the exporter traces its method; it is restored at the end.
    """

    def multiply(layer: Conv1D, x: Tensor) -> Tensor:
        product: Tensor = x @ layer.weight + layer.bias
        return product

    before = Conv1D.forward
    Conv1D.forward = multiply  # type: ignore[method-assign]
    try:
        yield
    finally:
        Conv1D.forward = before  # type: ignore[method-assign]


@contextmanager
def quiet_export() -> Iterator[None]:
    """A context in which the exporter prints nothing: it reports a missing torchvision, and warns of its own names."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
