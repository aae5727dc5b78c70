"""What a caption may say next: penalties, blocked n-grams, lengths and the sampling filters, as tensor operations over all rows.

Each function is transformers' logits processor of that name, in transformers' order, with every slot at its own length
(`generation/logits_process.py`); `sequence` is int64 [S, R, L] with the prompt first, `length` int64 [S] says how much of it is
said, `scores` is float32 [S, R, V].
"""

from __future__ import annotations

import torch

from capcli.decoding.settings import Settings


class Constraints:
    """All constraints of one run, applied in transformers' order."""

    def __init__(self, settings: Settings, device: torch.device | str) -> None:
        self.settings = settings
        self.prompt = len(settings.prompt)
        ids = {"eos": settings.eos_token_ids, "forced_eos": settings.forced_eos_token_ids}
        ids |= {"suppress": settings.suppress_tokens, "begin": settings.begin_suppress_tokens}
        self.ids = {name: torch.tensor(value, dtype=torch.long, device=device) for name, value in ids.items()}

    @property
    def active(self) -> bool:
        """False where `apply` would give back what it was given."""
        s = self.settings
        plain = Settings(s.prompt, s.eos_token_ids, s.max_new_tokens, num_beams=s.num_beams, do_sample=False)
        names = ("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_ids")
        names += ("remove_invalid_values", "suppress_tokens", "begin_suppress_tokens", "renormalize_logits", "do_sample")
        return any(getattr(s, name) != getattr(plain, name) for name in names)

    def apply(self, scores: torch.Tensor, sequence: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """The scores under every constraint in force; a new tensor."""
        scores = self.shape(scores, sequence, length)
        if self.settings.do_sample:
            scores = self.filter(scores)
        return scores.log_softmax(-1) if self.settings.renormalize_logits else scores

    def shape(self, scores: torch.Tensor, sequence: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        s, said = self.settings, length - self.prompt
        if s.repetition_penalty != 1.0:
            scores = repetition_penalty(scores, sequence, length, s.repetition_penalty)
        if s.no_repeat_ngram_size:
            scores = no_repeat_ngram(scores, sequence, length, s.no_repeat_ngram_size)
        if s.min_new_tokens and s.eos_token_ids:
            scores = suppress(scores, self.ids["eos"], said < s.min_new_tokens)
        if s.forced_bos_token_id is not None:
            scores = force(scores, torch.tensor([s.forced_bos_token_id], device=scores.device), length == 1)
        if s.forced_eos_token_ids:
            scores = force(scores, self.ids["forced_eos"], said == s.max_new_tokens - 1)
        if s.remove_invalid_values:
            scores = torch.nan_to_num(scores, nan=0.0)
        if s.suppress_tokens:
            scores = suppress(scores, self.ids["suppress"], torch.ones_like(said, dtype=torch.bool))
        if s.begin_suppress_tokens:
            begin = 0 if self.prompt > 1 or s.forced_bos_token_id is None else 1
            scores = suppress(scores, self.ids["begin"], said == begin)
        return scores

    def filter(self, scores: torch.Tensor) -> torch.Tensor:
        s = self.settings
        # beams must keep one token that does not end the caption
        keep = len(s.eos_token_ids) + 1 if s.num_beams > 1 and s.eos_token_ids else 2 if s.num_beams > 1 else 1
        if s.temperature != 1.0:
            scores = scores / s.temperature
        if s.top_k:
            scores = top_k(scores, max(s.top_k, keep))
        if s.top_p < 1.0:
            scores = top_p(scores, s.top_p, keep)
        return scores if s.min_p is None else min_p(scores, s.min_p, keep)


def repetition_penalty(scores: torch.Tensor, sequence: torch.Tensor, length: torch.Tensor, penalty: float) -> torch.Tensor:
    said = torch.arange(sequence.shape[2], device=scores.device) < length[:, None, None]
    ids = torch.where(said, sequence, sequence[:, :, :1])  # the first token is always said: repeating it changes nothing
    picked = scores.gather(2, ids)
    return scores.scatter(2, ids, torch.where(picked < 0, picked * penalty, picked / penalty))


def no_repeat_ngram(scores: torch.Tensor, sequence: torch.Tensor, length: torch.Tensor, size: int) -> torch.Tensor:
    """Bans what would end an n-gram said before: where the last n - 1 tokens stood before, what came after them."""
    windows = sequence.unfold(2, size, 1)  # [S, R, L - n + 1, n]
    ends = torch.arange(windows.shape[2], device=scores.device) + size <= length[:, None]  # [S, L - n + 1]
    at = (length[:, None] - size + 1 + torch.arange(size - 1, device=scores.device)).clamp_min(0)  # [S, n - 1]
    suffix = sequence.gather(2, at[:, None].expand(-1, sequence.shape[1], -1))  # [S, R, n - 1]
    banned = (windows[..., :-1] == suffix[:, :, None]).all(-1) & ends[:, None]
    # amin, so that a window that bans nothing cannot lift another's ban on the same token
    value = torch.where(banned, -torch.inf, torch.inf).to(scores.dtype)
    return scores.scatter_reduce(2, windows[..., -1], value, "amin", include_self=True)


def suppress(scores: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    out = scores.clone()
    out[:, :, ids] = out[:, :, ids].masked_fill(slots[:, None, None], -torch.inf)
    return out


def force(scores: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    only = torch.full_like(scores[:1, :1], -torch.inf)
    only[..., ids] = 0
    return torch.where(slots[:, None, None], only, scores)


def top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    least = scores.topk(min(k, scores.shape[-1])).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def top_p(scores: torch.Tensor, p: float, keep: int) -> torch.Tensor:
    ordered, index = scores.sort(descending=False)
    drop = ordered.softmax(-1).cumsum(-1) <= 1 - p
    drop[..., -keep:] = False
    return scores.masked_fill(drop.scatter(-1, index, drop), -torch.inf)


def min_p(scores: torch.Tensor, p: float, keep: int) -> torch.Tensor:
    probability = scores.softmax(-1)
    drop = probability < p * probability.amax(-1, keepdim=True)
    drop.scatter_(-1, probability.topk(min(keep, scores.shape[-1])).indices, False)
    return scores.masked_fill(drop, -torch.inf)
