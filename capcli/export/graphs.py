"""A captioner's encode and step as ONNX, from the very modules that run eagerly.

Two seams make that possible without model code of ours: an attention function registered with transformers, and a cache layer
that writes as the profile asks. `fused` (opset 24) has one TensorScatter and one Attention per layer; `portable` (opset 18)
is spelt out in operators that older runtimes have.
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
# Sizes of the example that is traced: all different, and none 0 or 1, which torch.export takes for constants.
CHUNK, SLOTS, ROWS, ENTRIES, WORDS = 2, 3, 5, 7, 9


@torch.library.custom_op("capcli::tensor_scatter", mutates_args=())
def tensor_scatter(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """ONNX's TensorScatter (opset 24), linear along axis -2: `new` [S, H, Q, D] into `entries` from at[s] on."""
    index = (at[:, None] + torch.arange(new.shape[2], device=new.device))[:, None, :, None].long()
    return entries.scatter(2, index.expand(new.shape), new)


@tensor_scatter.register_fake
def _(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:  # noqa: ARG001
    return torch.empty_like(entries)


def emit_tensor_scatter(entries: Any, new: Any, at: Any) -> Any:
    # the operator takes int64 places only
    return NEWEST_FIRST.TensorScatter(entries, new, NEWEST_FIRST.Cast(at, to=onnx.TensorProto.INT64), axis=-2)


def write_fused(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    written: Tensor = torch.ops.capcli.tensor_scatter(entries, new, at)
    return written


def write_portable(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Every entry is kept or taken from `new`, which a product with zeros and ones picks: no scatter is needed."""
    entry = torch.arange(entries.shape[2], device=new.device, dtype=at.dtype)
    query = torch.arange(new.shape[2], device=new.device, dtype=at.dtype)
    picked = entry[None, :, None] == (at[:, None] + query)[:, None]  # [S, N, Q]
    return torch.where(picked.any(-1)[:, None, :, None], picked[:, None].to(new.dtype) @ new, entries)


def attend_fused(
    module: nn.Module,  # noqa: ARG001
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """One Attention (opset 24): [S, H, Q, D] on [S, H, N, D] -> [S, Q, H, D]."""
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
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


WRITE: dict[str, Write] = {"fused": write_fused, "portable": write_portable}
AttentionInterface.register("capcli-fused", attend_fused)
AttentionInterface.register("capcli-portable", attend_portable)


class StepGraph(nn.Module):
    """A step whose pool goes in and comes out: a graph has no memory of its own."""

    def __init__(self, step: Step, write: Write, remembered: int) -> None:
        super().__init__()
        self.step, self.write, self.remembered = step, write, remembered

    def forward(
        self, tokens: Tensor, position: Tensor, at: Tensor, visible: Tensor, held: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """`held` is the memory, `remembered` tensors, and then the pool."""
        cache = pool_cache(held[: self.remembered], held[self.remembered :], at, self.write)
        logits = self.step.decode(tokens, position, visible, cache)
        layers: Any = cache.self_attention_cache.layers
        return (logits, *(entries for layer in layers for entries in (layer.keys, layer.values)))


def encode_graph(
    encode: Encode, size: tuple[int, int], profile: Profile, *, asked: bool = False
) -> tuple[onnx.ModelProto, Memory]:
    """pixels uint8 [E, h, w, 3], and where it is `asked` question int32 [E, W] -> memory_k0, memory_v0, ... [E, H, M, D]."""
    given: tuple[Tensor, ...] = (torch.zeros(CHUNK, *size, 3, dtype=torch.uint8),)
    axes: tuple[dict[int, str], ...] = ({0: "chunk"},)
    if asked:
        given, axes = (*given, torch.zeros(CHUNK, WORDS, dtype=torch.int32)), (*axes, {0: "chunk", 1: "words"})
    with torch.inference_mode():
        shape = encode(*(x[:1] for x in given))
    heads, positions, head_size = shape[0].shape[1:]
    positions -= WORDS if asked else 0
    memory = Memory(len(shape) // 2, heads, positions, head_size, prefixed=encode.prefixed, asked=asked)
    with ExitStack() as attending:
        for part in attending_parts(encode):
            attending.enter_context(attention(part, profile))
        graph = exported(
            encode, given, profile, ["pixels", "question"][: len(given)], [f"memory_{n}" for n in memory.names], axes
        )
    return graph, memory


def step_graph(step: Step, memory: Memory, dtype: torch.dtype, profile: Profile) -> onnx.ModelProto:
    """tokens, position int32 [S, Q], at int32 [S], visible bool [S, Q, N], memory, pool -> logits [S, Q, V], pool."""
    names = memory.names
    # each a tensor of its own: one that is given twice becomes one input
    tokens, position = (torch.zeros(SLOTS, ROWS, dtype=torch.int32) for _ in range(2))
    at = torch.zeros(SLOTS, dtype=torch.int32)
    remembered = memory.positions + (WORDS if memory.asked else 0)
    kept = [torch.zeros(SLOTS, memory.heads, remembered, memory.head_size, dtype=dtype) for _ in names]
    image = memory.positions if memory.prefixed else 0
    pool = [torch.zeros(SLOTS, memory.heads, image + ENTRIES, memory.head_size, dtype=dtype) for _ in names]
    visible = torch.ones(SLOTS, ROWS, image + ENTRIES, dtype=torch.bool)
    if memory.prefixed:
        kept = []
    given = [f"memory_{n}" for n in names[: len(kept)]]
    inputs = ["tokens", "position", "at", "visible", *given, *(f"pool_{n}" for n in names)]
    shapes = (
        {0: "slots", 1: "rows"},
        {0: "slots", 1: "rows"},
        {0: "slots"},
        {0: "slots", 1: "rows", 2: "entries"},
        [{0: "slots"} | ({2: "remembered"} if memory.asked else {}) for _ in kept]
        + [{0: "slots", 2: "entries"} for _ in names],
    )
    with attention(step.decoder, profile):
        return exported(
            StepGraph(step, WRITE[profile], len(kept)),
            (tokens, position, at, visible, kept + pool),
            profile,
            inputs,
            ["logits", *(f"pool_out_{n}" for n in names)],
            shapes,
        )


def attending_parts(module: nn.Module) -> list[PreTrainedModel]:
    """The innermost of transformers' models in a module."""
    models = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    return [each for each in models if sum(isinstance(part, PreTrainedModel) for part in each.modules()) == 1]


@contextmanager
def attention(module: Any, profile: Profile) -> Iterator[None]:
    """In it a transformers model attends as the profile has it, where it lets its attention be chosen."""
    if not (module._supports_sdpa or module._supports_attention_backend):  # noqa: SLF001  (nothing in it attends)
        yield
        return
    before = module.config._attn_implementation  # noqa: SLF001
    chosen = f"capcli-{profile}" if getattr(module, "_supports_attention_backend", False) else "eager"
    module.set_attn_implementation(chosen)
    try:
        yield
    finally:
        module.set_attn_implementation(before)


def exported(
    module: nn.Module,
    example: tuple[Any, ...],
    profile: Profile,
    inputs: list[str],
    outputs: list[str],
    axes: tuple[Any, ...],
) -> onnx.ModelProto:
    names = sorted(set(named_axes(axes)))
    sizes = {name: torch.export.Dim(name, min=1, max=1 << 20) for name in names}
    with quiet_export(), unflattened_products(), torch.inference_mode():
        program = torch.onnx.export(
            module,
            example,
            None,
            dynamo=True,
            verbose=False,
            opset_version=OPSET[profile],
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=with_sizes(axes, sizes),
            custom_translation_table={torch.ops.capcli.tensor_scatter.default: emit_tensor_scatter},
        )
    assert program is not None
    return program.model_proto


def named_axes(axes: Any) -> Iterator[str]:
    for each in axes:
        yield from each.values() if isinstance(each, dict) else named_axes(each)


def with_sizes(axes: Any, sizes: dict[str, Any]) -> Any:
    if isinstance(axes, dict):
        return {axis: sizes[name] for axis, name in axes.items()}
    return type(axes)(with_sizes(each, sizes) for each in axes)


@contextmanager
def unflattened_products() -> Iterator[None]:
    """In it GPT-2's linear layers multiply without making two dimensions of three: 144 Reshapes less (BENCHMARKS.md)."""

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
    """The exporter talks of torchvision, and warns of names that it chose itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
