"""transformers' cache interface over memory (filled cross-attention layers) and pool (self-attention, written in place)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, arange
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

# (entries [S, H, N, D], new [S, H, Q, D], at [S]) -> the entries with slot s's new ones written from entry at[s] on
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def write_in_place(entries: Tensor, new: Tensor, at: Tensor) -> Tensor:
    slot = arange(new.shape[0], device=new.device)[:, None]
    entry = at[:, None] + arange(new.shape[2], device=new.device)  # [S, Q]
    entries[slot, :, entry] = new.transpose(1, 2).to(entries.dtype)
    return entries


class PoolLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values [S, H, N, D]; `update` writes new ones, slot s's from entry `at[s]` on."""

    is_compileable, is_sliding = True, False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, at: Tensor | None = None, write: Write = write_in_place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.at, self.write, self.is_initialized = keys, values, at, write, True

    def lazy_initialization(self, *_: Any) -> None:
        """Does nothing: the tensors exist."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        assert self.at is not None
        self.keys = self.write(self.keys, key_states, self.at)
        self.values = self.write(self.values, value_states, self.at)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0  # positions are passed explicitly

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    def get_max_cache_shape(self) -> int:
        return self.keys.shape[2]


class KeepingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Stores the keys and values [E, H, M, D] of one layer's only `update`."""

    is_compileable, is_sliding = True, False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_initialized = True

    def lazy_initialization(self, *_: Any) -> None:
        """Does nothing: `update` provides the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class Layers(Cache):
    """A cache of given layers."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers, self.layer_class_to_replicate, self.offloading = layers, None, False


def pool_cache(
    memory: Sequence[Tensor], pool: Sequence[Tensor], at: Tensor, write: Write = write_in_place
) -> EncoderDecoderCache:
    """The cache of one step. `memory` and `pool` are keys and values of every layer in turn; `at` [S]: where to write."""
    count = len(pool) // 2
    self_attention = Layers([PoolLayer(pool[2 * i], pool[2 * i + 1], at, write) for i in range(count)])
    cross = Layers([PoolLayer(memory[2 * i], memory[2 * i + 1]) for i in range(len(memory) // 2)])
    cache = EncoderDecoderCache(self_attention, cross)
    cache.is_updated = dict.fromkeys(range(count), True)
    return cache


def keeping_cache(layers: int) -> Cache:
    """A cache that stores the keys and values of one forward pass."""
    return Layers([KeepingLayer() for _ in range(layers)])
