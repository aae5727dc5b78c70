"""Constraints on the next token: penalties, banned n-grams, lengths and sampling filters, as tensor operations over all rows.

Each function is transformers' logits processor of that name (`generation/logits_process.py`), with every slot at its own
length. `scores` is [S, R, V], float32 except for the functions in BANS, which take any floating dtype; `sequence` is int64
[S, R, L], the prompt first, after NO_TOKEN where it is shorter than others; `length` int64 [S] is the number of entries in it so
far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from capcli.decoding.settings import Settings

Where = Callable[[Tensor], Tensor]  # length [S] -> bool [S]
Constraint = Callable[[Tensor, Tensor, Tensor], Tensor]  # scores, sequence, length -> scores


class Constraints:
    """All constraints of a run, in transformers' order.

    `only_ban`: they only set scores to -inf, so they may be applied to raw logits of any dtype.
    """

    def __init__(self, settings: Settings, device: torch.device | str) -> None:
        self._all = [*shaping(settings, device), *(filters(settings) if settings.do_sample else ())]
        if settings.renormalize_logits:
            self._all.append(lambda scores, *_: scores.log_softmax(-1))
        self.only_ban = all(isinstance(constraint, partial) and constraint.func in BANS for constraint in self._all)

    def apply(self, scores: Tensor, sequence: Tensor, length: Tensor) -> Tensor:
        """The scores [S, R, V] under all constraints. The argument is not changed in place."""
        for constraint in self._all:
            scores = constraint(scores, sequence, length)
        return scores


def shaping(settings: Settings, device: torch.device | str) -> Iterator[Constraint]:
    """The constraints of every search: transformers' logits processors."""
    s, prompt = settings, settings.context
    ids = partial(torch.tensor, dtype=torch.long, device=device)
    if s.repetition_penalty != 1.0:
        yield partial(repetition_penalty, penalty=s.repetition_penalty)
    if s.no_repeat_ngram_size:
        yield partial(no_repeat_ngram, size=s.no_repeat_ngram_size)
    for words in by_length(s.bad_words_ids):
        table = ids(words)
        yield partial(ban_words, starts=table[:, :-1], ends=table[:, -1])
    if s.min_new_tokens and s.eos_token_ids:
        yield partial(suppress, ids=ids(s.eos_token_ids), where=lambda n: n < prompt + s.min_new_tokens)
    if s.forced_bos_token_id is not None and not s.prompt_room:
        yield partial(force, ids=ids([s.forced_bos_token_id]), where=lambda n: n == 1)
    if s.forced_eos_token_ids:
        yield partial(force, ids=ids(s.forced_eos_token_ids), where=lambda n: n == prompt + s.max_new_tokens - 1)
    if s.remove_invalid_values:
        yield lambda scores, *_: torch.nan_to_num(scores, nan=0.0)
    if s.suppress_tokens:
        yield partial(suppress, ids=ids(s.suppress_tokens), where=lambda n: n >= 0)
    if s.begin_suppress_tokens:
        begin = prompt if prompt > 1 or s.prompt_room or s.forced_bos_token_id is None else prompt + 1
        yield partial(suppress, ids=ids(s.begin_suppress_tokens), where=lambda n: n == begin)


def filters(settings: Settings) -> Iterator[Constraint]:
    """The sampling filters; beam search keeps one token more than there are end tokens."""
    s = settings
    keep = 1 if s.num_beams == 1 else 1 + max(1, len(s.eos_token_ids))
    if s.temperature != 1.0:
        yield lambda scores, *_: scores / s.temperature
    if s.top_k:
        yield partial(top_k, k=max(s.top_k, keep))
    if s.top_p < 1.0:
        yield partial(top_p, p=s.top_p, keep=keep)
    if s.min_p is not None:
        yield partial(min_p, p=s.min_p, keep=keep)


def repetition_penalty(scores: Tensor, sequence: Tensor, length: Tensor, penalty: float) -> Tensor:
    used = torch.arange(sequence.shape[2], device=scores.device) < length[:, None, None]
    last = sequence.gather(2, (length - 1)[:, None, None].expand(-1, sequence.shape[1], 1))
    ids = torch.where(used & (sequence >= 0), sequence, last)  # other entries repeat the last token, without effect
    picked = scores.gather(2, ids)
    return scores.scatter(2, ids, torch.where(picked < 0, picked * penalty, picked / penalty))


def no_repeat_ngram(scores: Tensor, sequence: Tensor, length: Tensor, size: int) -> Tensor:
    """Bans the tokens that followed earlier occurrences of the last n - 1 tokens: they would repeat an n-gram."""
    if size > sequence.shape[2]:
        return scores  # no sequence becomes so long
    windows = sequence.unfold(2, size, 1)  # [S, R, L - n + 1, n]
    ends = torch.arange(windows.shape[2], device=scores.device) + size <= length[:, None]  # [S, L - n + 1]
    at = (length[:, None] - size + 1 + torch.arange(size - 1, device=scores.device)).clamp_min(0)  # [S, n - 1]
    suffix = sequence.gather(2, at[:, None].expand(-1, sequence.shape[1], -1))  # [S, R, n - 1]
    banned = (windows[..., :-1] == suffix[:, :, None]).all(-1) & ends[:, None] & (windows[..., 0] >= 0)
    # amin: a window without a ban must not overwrite another window's ban on the same token
    value = torch.where(banned, -torch.inf, torch.inf).to(scores.dtype)
    return scores.scatter_reduce(2, windows[..., -1].clamp_min(0), value, "amin", include_self=True)


def by_length(words: Iterable[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """The token sequences in groups of equal length."""
    for _, group in groupby(sorted(words, key=len), key=len):
        yield list(group)


def ban_words(scores: Tensor, sequence: Tensor, length: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Bans the last token of each word, `ends` [W], after all its other tokens, `starts` [W, n - 1]."""
    count = starts.shape[1]
    if count > sequence.shape[2]:
        return scores  # no sequence becomes so long
    at = (length[:, None] - count + torch.arange(count, device=scores.device)).clamp_min(0)  # [S, n - 1]
    suffix = sequence.gather(2, at[:, None].expand(-1, sequence.shape[1], -1))  # [S, R, n - 1]
    banned = (suffix[:, :, None] == starts).all(-1) & (length >= count)[:, None, None]  # [S, R, W]
    value = torch.where(banned, -torch.inf, torch.inf).to(scores.dtype)
    return scores.scatter_reduce(2, ends.expand(banned.shape), value, "amin", include_self=True)


def suppress(scores: Tensor, _sequence: Tensor, length: Tensor, ids: Tensor, where: Where) -> Tensor:
    out = scores.clone()
    out[:, :, ids] = out[:, :, ids].masked_fill(where(length)[:, None, None], -torch.inf)
    return out


def force(scores: Tensor, _sequence: Tensor, length: Tensor, ids: Tensor, where: Where) -> Tensor:
    only = torch.full_like(scores[:1, :1], -torch.inf)
    only[..., ids] = 0
    return torch.where(where(length)[:, None, None], only, scores)


BANS = (no_repeat_ngram, ban_words, suppress)


def top_k(scores: Tensor, *_: Tensor, k: int) -> Tensor:
    least = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def top_p(scores: Tensor, *_: Tensor, p: float, keep: int) -> Tensor:
    ordered, index = scores.sort(descending=False)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -keep:] = False
    return scores.masked_fill(drop.scatter(-1, index, drop), -torch.inf)


def min_p(scores: Tensor, *_: Tensor, p: float, keep: int) -> Tensor:
    probability = scores.softmax(-1)
    drop = probability < p * probability.amax(-1, keepdim=True)
    drop.scatter_(-1, probability.topk(min(keep, scores.shape[-1])).indices, False)
    return scores.masked_fill(drop, -torch.inf)
