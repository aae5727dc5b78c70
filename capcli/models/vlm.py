"""Vision-language models whose decoder reads image and prompt as one sequence, on capcli's decode loop.

`Prefill` runs transformers' own forward over the prompt, which knows of deepstack, M-RoPE and which prefix tokens see each other;
its keys and values are the image's prefix, which all rows of a slot share. `VlmStep` then runs the language model alone. What
models differ in follows from their configs (sliding windows, soft caps, M-RoPE's shift) and from FAMILIES, so they share this
file. They are not exported: their prefixes differ in length, and engines have fixed shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from capcli.models.cache import Layers, PoolLayer

ATTENTION = "capcli-grouped"
MOST_ROWS = 64  # query rows of a step, for which `attend_grouped` is made; more are a prefill, for PyTorch's kernels


@dataclass(frozen=True)
class VlmFamily:
    """How a model differs from the others.

    `first` is the position of the first token. `whole_prefix`: tokens of the prefix see each other, also beyond a sliding window.
    `ids` are the token ids that generate() puts before the caption where the processor gives none, by the model's config.
    `answer_type` is the token type of a caption that the model is trained on.
    """

    first: int = 0
    whole_prefix: bool = False
    answer_type: int = 0
    ids: Callable[[Any], list[int]] | None = None


def image_and_start(config: Any) -> list[int]:
    """The ids of BLIP-2's generate() without a prompt."""
    return [config.image_token_id] * config.num_query_tokens + [config.text_config.bos_token_id]


# Of the models in model_files.VLMS, those that differ from LLaVA.
FAMILIES: Mapping[str, VlmFamily] = {
    "blip-2": VlmFamily(ids=image_and_start),
    "paligemma": VlmFamily(first=1, whole_prefix=True, answer_type=1),
}


def vlm_family(config: Mapping[str, Any]) -> VlmFamily:
    """The family of the config.json of a vision-language model."""
    return FAMILIES.get(str(config.get("model_type")), VlmFamily())


def with_ids(inputs: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    """A processor's tensors with the token ids that generate() adds to those of a processor without text."""
    ids = vlm_family({"model_type": model.config.model_type}).ids
    return (
        inputs if "input_ids" in inputs or ids is None else {**inputs, "input_ids": torch.tensor([ids(model.config)])}
    )


class Prefill(nn.Module):
    """Image and prompt to prefix: the language model's keys and values of all tokens but the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner: Any = getattr(model, "model", model)
        use_grouped_attention(language_model(model))

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """A processor's tensors of one image -> 2 x layers of [1, H, L - 1, D], and by how much later positions are shifted [1].

        The first step runs the last token again. It is part of this pass too: others may see it.
        """
        cache = DynamicCache()  # without a config no layer drops what is outside its window
        self.inner.rope_deltas = None
        self.inner(**inputs, past_key_values=cache, use_cache=True)
        shift = getattr(self.inner, "rope_deltas", None)
        layers: Any = cache.layers
        kept = [entries[:, :, :-1] for layer in layers for entries in (layer.keys, layer.values)]
        return kept, kept[0].new_zeros(1, dtype=torch.long) if shift is None else shift.view(-1)[:1].long()


class VlmStep(nn.Module):
    """One pass of the language model over the rows of all slots, which share their slot's prefix."""

    def __init__(self, model: nn.Module, family: VlmFamily) -> None:
        super().__init__()
        self.family = family
        self.text: Any = language_model(model)
        whole: Any = model
        self.head: Any = whole.get_output_embeddings()
        config = self.text.config
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.window: int | None = getattr(config, "sliding_window", None)
        self.kinds = frozenset(getattr(config, "layer_types", None) or ())
        for module in self.text.modules():
            # "dynamic" compares positions with the model's longest in every step, which waits for the device. None is longer.
            if getattr(module, "rope_type", None) == "dynamic":
                module.rope_type = "default"
        self.vocabulary = int(config.vocab_size)
        self.positions = int(config.max_position_embeddings)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        start: Tensor,
        shift: Tensor,
        visible: Tensor,
        room: int,
        pool: Sequence[Tensor],
    ) -> Tensor:
        """tokens [S, R], position, start and shift [S], visible bool [S, R, N] -> logits [S, R, V].

        `position` counts new tokens, `start` are the lengths of the prefixes, for which there are `room` entries, and `shift` is
        added to the position in the sequence. The pool is 2 x layers of [S, H, N, D]; the new keys and values of a slot are
        written in place, from entry room + position * R on.
        """
        rows = tokens.shape[1]
        at = room + position * rows
        cache = Layers([PoolLayer(pool[2 * i], pool[2 * i + 1], at) for i in range(len(pool) // 2)])
        out = self.text(
            input_ids=tokens,
            position_ids=(start + position + shift + self.family.first)[:, None].expand(-1, rows),
            attention_mask=self.masks(position, start, visible, room, pool[0].dtype),
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = self.head(out.last_hidden_state)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.text.dtype
        return dtype

    @property
    def entry_bytes(self) -> int:
        """The bytes of the keys and values of one token in all layers."""
        config = self.text.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * size * self.dtype.itemsize)

    def masks(self, position: Tensor, start: Tensor, visible: Tensor, room: int, dtype: torch.dtype) -> Any:
        """The additive mask [S, 1, R, N], or one for each kind of layer."""
        whole = additive(visible, dtype)
        if self.window is None or (self.kinds and "sliding_attention" not in self.kinds):
            return whole
        near = additive(visible & self.near(position, start, visible, room), dtype)
        return {"full_attention": whole, "sliding_attention": near} if self.kinds else near

    def near(self, position: Tensor, start: Tensor, visible: Tensor, room: int) -> Tensor:
        """Which entries are inside the window of each slot's new tokens, bool [S, 1, N]."""
        assert self.window is not None
        entry = torch.arange(visible.shape[2], device=visible.device).expand(len(start), -1)
        token = (entry - room).div(
            visible.shape[1], rounding_mode="floor"
        )  # the caption has an entry per row and token
        index = torch.where(entry < room, entry, start[:, None] + token)
        near = (start + position)[:, None] - index < self.window
        if self.family.whole_prefix:
            near = near | (position == 0)[:, None]
        return near[:, None]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """bool [S, R, N] -> the additive mask [S, 1, R, N]."""
    zero, hidden = (
        torch.full((), value, dtype=dtype, device=visible.device) for value in (0.0, torch.finfo(dtype).min)
    )
    return torch.where(visible, zero, hidden)[:, None]


def language_model(model: Any) -> Any:
    """The decoder of a vision-language model, without its head."""
    inner = getattr(model, "model", model)
    text = getattr(inner, "language_model", None) or inner.text_model
    if hasattr(text, "lm_head"):  # BLIP-2 and InstructBLIP hold a whole language model
        text = text.model
    return getattr(text, "decoder", text)


def use_grouped_attention(text: Any) -> None:
    """Sets `attend_grouped` for a language model. Without a mask function of that name a prefill would have no mask."""
    AttentionInterface.register(ATTENTION, attend_grouped)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    text.set_attn_implementation(ATTENTION)


def attend_grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [S, H, Q, D], key and value [S, G, N, D], mask [S, 1, Q, N] -> [S, Q, H, D].

    The H / G heads that share keys become rows of one product, so that keys are read once for all of them.
    """
    slots, heads, rows, size = query.shape
    groups = key.shape[1]
    if rows > MOST_ROWS and softcap is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)[0]
        return out, None
    folded = query.reshape(slots, groups, heads // groups * rows, size) * (size**-0.5 if scaling is None else scaling)
    scores = folded @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.view(slots, groups, heads // groups, rows, -1) + mask[:, :, None]
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    mixed = weights.view(slots, groups, heads // groups * rows, -1) @ value
    return mixed.reshape(slots, heads, rows, size).transpose(1, 2), None
