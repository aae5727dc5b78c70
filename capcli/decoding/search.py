"""Greedy search, sampling and beam search over slots and rows, token for token as transformers' `generate()`.

The state of all slots is stored on the device in tensors of fixed shape; every slot is at its own position. The state of a slot
that has ended no longer changes, so its end may be read late. S slots, R rows, T new tokens at most, V tokens in the vocabulary,
P prefix entries of the pool (the prompt but its last token; none where images have prompts of their own), C tokens of context
before the caption, L = C + T. A context that is shorter than C begins with NO_TOKEN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from capcli.decoding import noise
from capcli.decoding.constraints import Constraints
from capcli.decoding.settings import NO_TOKEN, Settings
from capcli.decoding.topk import BLOCK, best_of_blocks, summarize_logits

FAR_BELOW = -1.0e9  # generate()'s penalty for candidates that must not be chosen


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One caption: its token ids, the end token included. `score` is the mean raw log-probability of `tokens`.

    `beam_score` is generate()'s `sequences_scores`; with one beam the sum of the raw log-probabilities.
    """

    tokens: tuple[int, ...]
    score: float
    beam_score: float


def make_search(settings: Settings, slots: int, device: torch.device | str) -> Search:
    """The search for these settings."""
    return (Beams if settings.num_beams > 1 else Independent)(settings, slots, device)


class Search(ABC):
    """The state that every search keeps: tokens, positions, and the pool entries that each row attends to."""

    def __init__(self, settings: Settings, slots: int, device: torch.device | str) -> None:
        s, r, t, p = slots, settings.rows, settings.max_new_tokens, len(settings.prompt) - 1
        self.settings, self.device, self.prefix, self.last = settings, device, p, settings.context - 1
        self.constraints = Constraints(settings, device)
        self.prompt = torch.tensor(settings.prompt, dtype=torch.long, device=device)
        self.eos = torch.tensor(settings.eos_token_ids, dtype=torch.long, device=device)
        self.row = torch.arange(r, device=device)
        self.keys = torch.zeros(s, dtype=torch.long, device=device)
        self.position = torch.zeros(s, dtype=torch.long, device=device)  # new tokens so far
        self.ended = torch.ones(s, dtype=torch.bool, device=device)  # also true for a slot that was never used
        self.sequence = torch.zeros(s, r, settings.context + t, dtype=torch.long, device=device)
        self.visible = torch.zeros(s, r, p + r * t, dtype=torch.bool, device=device)  # the prefix and a row's ancestors
        self.raw = torch.zeros(s, r, device=device)  # sum of raw log-probabilities

    def admit(self, slots: Sequence[int], keys: Sequence[int], prompts: Sequence[Sequence[int]] = ()) -> None:
        """Starts new images in `slots`; `keys` are the keys of their sampling noise, `prompts` their own prompts."""
        at = torch.tensor(slots, device=self.device)
        self.keys[at] = torch.tensor(keys, device=self.device)
        self.sequence[at] = 0
        self.sequence[at, :, : self.last + 1] = self.contexts(prompts)
        self.visible[at] = False
        self.visible[at, :, : self.prefix] = True
        for state in (self.position, self.ended, self.raw):
            state[at] = 0

    def contexts(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The context of each prompt, or of the settings' [n or 1, 1, C]."""
        if not self.settings.prompt_room:
            return self.prompt[None, None]
        count = self.settings.context
        ids = [[*[NO_TOKEN] * (count - len(prompt)), *prompt[-count:]] for prompt in prompts]
        return torch.tensor(ids, dtype=torch.long, device=self.device)[:, None]

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next step's input: tokens [S, R], position [S] and visible [S, R, P + R*T], which includes each row's new entry."""
        position = self.position.clamp_max(self.settings.max_new_tokens - 1)
        rows = self.row.numel()
        entry = self.prefix + position[:, None] * rows + self.row  # [S, R]
        self.visible.scatter_(2, entry[:, :, None], True)
        tokens = self.sequence.gather(2, (self.last + position)[:, None, None].expand(-1, rows, 1))[:, :, 0]
        return tokens, position, self.visible

    @abstractmethod
    def advance(self, logits: Tensor) -> None:
        """Chooses the next token of every row from a step's logits [S, R, V]; slots that have ended do not change."""

    @abstractmethod
    def hypotheses(self, slots: Sequence[int]) -> list[list[Hypothesis]]:
        """The captions of each of `slots`, best first."""

    def constrained(self, scores: Tensor) -> Tensor:
        return self.constraints.apply(scores, self.sequence, self.last + 1 + self.position)

    def ends(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, self.eos)

    def noise(self, shape: torch.Size) -> Tensor:
        return noise.gumbel(self.keys, self.position, shape[1], shape[2])

    def append(self, sequence: Tensor, tokens: Tensor) -> Tensor:
        """A copy of `sequence` [S, K, L] with `tokens` [S, K] at each slot's next position."""
        at = (self.last + 1 + self.position).clamp_max(sequence.shape[2] - 1)
        return sequence.scatter(2, at[:, None, None].expand(-1, sequence.shape[1], 1), tokens[:, :, None])

    def keep(self, live: Tensor, **new: Tensor) -> None:
        """Writes new state where `live` [S] or [S, R] is true, in place: a recorded step reads the same tensors again."""
        for name, value in new.items():
            where = live.view(*live.shape, *[1] * (value.dim() - live.dim()))
            state: Tensor = getattr(self, name)
            state.copy_(torch.where(where, value, state))


class Independent(Search):
    """Greedy search and sampling: the rows of a slot are independent of each other."""

    def __init__(self, settings: Settings, slots: int, device: torch.device | str) -> None:
        super().__init__(settings, slots, device)
        self.row_ended = torch.zeros(slots, settings.rows, dtype=torch.bool, device=device)
        self.length = torch.zeros(slots, settings.rows, dtype=torch.long, device=device)

    def admit(self, slots: Sequence[int], keys: Sequence[int], prompts: Sequence[Sequence[int]] = ()) -> None:
        super().admit(slots, keys, prompts)
        at = torch.tensor(slots, device=self.device)
        self.row_ended[at] = False
        self.length[at] = 0

    def advance(self, logits: Tensor) -> None:
        scores = self.constrained(logits if self.constraints.only_ban else logits.float())
        if self.settings.do_sample:
            scores = scores + self.noise(scores.shape)
        tokens = scores.max(-1).indices  # [S, R], the first of equals; argmax is several times slower on a CPU
        chosen = summarize_logits(logits).log_probabilities(logits, tokens[:, :, None])[:, :, 0]
        position = self.position + 1
        live = ~self.ended[:, None] & ~self.row_ended
        self.keep(
            live,
            sequence=self.append(self.sequence, tokens),
            raw=self.raw + chosen,
            length=self.length + 1,
            row_ended=self.ends(tokens),
        )
        over = self.row_ended.all(1) | (position >= self.settings.max_new_tokens)
        self.keep(~self.ended, position=position, ended=over)

    def hypotheses(self, slots: Sequence[int]) -> list[list[Hypothesis]]:
        at = torch.tensor(slots, device=self.device)
        read = (self.sequence[at, :, self.last + 1 :], self.length[at], self.raw[at], self.raw[at])
        return captions(*(x.cpu() for x in read))


class Beams(Search):
    """Beam search, with or without sampling: running beams, and the finished hypotheses of every slot."""

    def __init__(self, settings: Settings, slots: int, device: torch.device | str) -> None:
        super().__init__(settings, slots, device)
        s, r, t = slots, settings.num_beams, settings.max_new_tokens
        self.candidates = max(2, 1 + len(settings.eos_token_ids)) * r  # so that at least R have not ended
        self.score = torch.zeros(s, r, device=device)
        self.done_sequence = torch.zeros_like(self.sequence)
        self.done_score = torch.zeros(s, r, device=device)
        self.done_raw = torch.zeros(s, r, device=device)
        self.done_length = torch.zeros(s, r, dtype=torch.long, device=device)
        self.done = torch.zeros(s, r, dtype=torch.bool, device=device)
        self.improvable = torch.ones(s, dtype=torch.bool, device=device)
        # computed in float64, as Python's power of an int is, and then rounded
        power = [float(n) ** settings.length_penalty if n else 1.0 for n in range(t + 2)]
        self.power = torch.tensor(power, dtype=torch.float64, device=device).float()

    def admit(self, slots: Sequence[int], keys: Sequence[int], prompts: Sequence[Sequence[int]] = ()) -> None:
        super().admit(slots, keys, prompts)
        at = torch.tensor(slots, device=self.device)
        self.score[at] = 0
        self.score[at, 1:] = FAR_BELOW  # all rows are equal at first: only the first may be continued
        self.done_sequence[at] = self.sequence[at]
        self.done_score[at] = FAR_BELOW
        self.improvable[at] = True
        for state in (self.done_raw, self.done_length, self.done):
            state[at] = 0

    def advance(self, logits: Tensor) -> None:
        r, v = logits.shape[1:]
        top, raw, picked = self.pick(logits)  # [S, K] each
        parent, token = picked // v, picked % v
        raw = raw + self.raw.gather(1, parent)
        position = self.position + 1
        sequence = self.append(rows_of(self.sequence, parent), token)  # [S, K, L]
        hits = self.ends(token) | (position >= self.settings.max_new_tokens)[:, None]
        running = top + hits.float() * FAR_BELOW
        best = running.topk(r).indices
        live = ~self.ended
        self.finish(top, raw, sequence, hits, position, live)
        self.keep(
            live,
            sequence=rows_of(sequence, best),
            visible=rows_of(self.visible, parent.gather(1, best)),
            score=running.gather(1, best),
            raw=raw.gather(1, best),
            position=position,
        )
        self.stop(hits, live)

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The K best continuations of a slot's rows: accumulated score, raw log-probability, row * V + token; each [S, K]."""
        if self.constraints.only_ban and not self.settings.do_sample:
            return self.pick_few(logits)
        plain = logits.float().log_softmax(-1)
        scores = self.constrained(plain)
        total = (scores + self.score[:, :, None]).flatten(1)  # [S, R*V]
        if self.settings.do_sample:
            picked = (total + self.noise(scores.shape).flatten(1)).topk(self.candidates).indices
            top = total.gather(1, picked)
        else:  # one topk over all rows: several forced end tokens tie, and in generate() topk breaks the tie
            top, picked = total.topk(self.candidates)
        return top, plain.flatten(1).gather(1, picked), picked

    def pick_few(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`pick` where constraints only ban tokens: a row's best tokens have its largest logits, and only they need scores."""
        few, summary = min(self.candidates, logits.shape[2]), summarize_logits(logits)
        allowed = self.constrained(logits)
        best, token = top_few(allowed, few, summary.best if allowed is logits else best_of_blocks(allowed))
        plain = summary.log_probabilities(logits, token)  # [S, R, few]
        plain = plain.masked_fill(best == -math.inf, -math.inf)  # banned tokens
        top, index = (plain + self.score[:, :, None]).flatten(1).topk(self.candidates)
        row = index // few
        return top, plain.flatten(1).gather(1, index), row * logits.shape[2] + token.flatten(1).gather(1, index)

    def finish(self, top: Tensor, raw: Tensor, sequence: Tensor, hits: Tensor, position: Tensor, live: Tensor) -> None:
        """Keeps the best R of the finished hypotheses and of those of the first R candidates that ended in this step."""
        r = self.settings.num_beams
        just = hits & (torch.arange(self.candidates, device=top.device) < r)
        score = top / self.power[position][:, None]
        if self.settings.early_stopping is True:
            score = score + self.done.all(1, keepdim=True).float() * FAR_BELOW
        score = score + (~self.improvable)[:, None].float() * FAR_BELOW
        score = score + (~just).float() * FAR_BELOW
        merged = torch.cat((self.done_score, score), 1)
        keep = merged.topk(r).indices
        length = position[:, None].expand_as(top)
        self.keep(
            live,
            done_sequence=rows_of(torch.cat((self.done_sequence, sequence), 1), keep),
            done_score=merged.gather(1, keep),
            done_raw=torch.cat((self.done_raw, raw), 1).gather(1, keep),
            done_length=torch.cat((self.done_length, length), 1).gather(1, keep),
            done=torch.cat((self.done, just), 1).gather(1, keep),
        )

    def stop(self, hits: Tensor, live: Tensor) -> None:
        """Ends the slots whose finished hypotheses cannot be improved, by the rules of `early_stopping`."""
        s = self.settings
        longest = s.early_stopping == "never" and s.length_penalty > 0
        power = self.power[torch.full_like(self.position, s.max_new_tokens) if longest else self.position]
        possible = self.score[:, 0] / power
        worst = torch.where(self.done, self.done_score.amin(1, keepdim=True), FAR_BELOW)
        improvable = self.improvable & (possible[:, None] > worst).any(1)
        over = ~improvable | hits.all(1)
        if s.early_stopping is True:
            over = over | self.done.all(1)
        self.keep(live, improvable=improvable, ended=over)

    def hypotheses(self, slots: Sequence[int]) -> list[list[Hypothesis]]:
        at, n = torch.tensor(slots, device=self.device), self.settings.num_return_sequences
        state = (self.done_sequence[:, :, self.last + 1 :], self.done_length, self.done_raw, self.done_score)
        return captions(*(x[at, :n].cpu() for x in state))


def rows_of(state: Tensor, parent: Tensor) -> Tensor:
    """Rows `parent` [S, K] of `state` [S, R, ...]."""
    index = parent.view(*parent.shape, *[1] * (state.dim() - 2))
    return state.gather(1, index.expand(*parent.shape, *state.shape[2:]))


def top_few(x: Tensor, k: int, best: Tensor) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` over a long last dimension; `best` [..., whole blocks] are the maxima of its blocks.

    The k largest values are in the k blocks with the largest maxima, or in the rest after the last whole block.
    """
    n, whole = x.shape[-1], best.shape[-1]
    if whole <= k:
        return x.topk(k)
    blocks = x[..., : whole * BLOCK].view(*x.shape[:-1], whole, BLOCK)
    chosen = best.topk(k).indices.sort(-1).values  # [..., k]
    inside = blocks.gather(-2, chosen[..., None].expand(*chosen.shape, BLOCK)).flatten(-2)
    index = (chosen[..., None] * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(-2)
    rest = torch.arange(whole * BLOCK, n, device=x.device).expand(*x.shape[:-1], -1)
    values, at = torch.cat((inside, x[..., whole * BLOCK :]), -1).topk(k)
    return values, torch.cat((index, rest), -1).gather(-1, at)


def captions(tokens: Tensor, length: Tensor, raw: Tensor, score: Tensor) -> list[list[Hypothesis]]:
    """Hypotheses from tokens [n, K, T], and length, raw and score, each [n, K]."""
    return [
        [
            Hypothesis(tuple(ids[:count]), total / max(count, 1), beam)
            for ids, count, total, beam in zip(*slot, strict=True)
        ]
        for slot in zip(tokens.tolist(), length.tolist(), raw.tolist(), score.tolist(), strict=True)
    ]
